"""The state of each job, from the files in its folder."""

import json

import pytest

from alignment_gap.folders import locked
from alignment_gap.launch import status_text
from alignment_gap.launch.tasks import Task


@pytest.fixture
def tasks(tmp_path):
    """A training job, and another one that needs it."""
    return [Task("sft", ("train",), tmp_path / "sft"), Task("arm", ("train",), tmp_path / "arm", ("sft",))]


def begin(folder, **lines):
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"kind": "train", "steps": 100}))
    if lines:
        (folder / "metrics.jsonl").write_text(json.dumps(lines) + "\n")


def states(tasks):
    return [line.split(maxsplit=1)[1] for line in status_text(tasks).splitlines()]


def test_nothing_was_begun(tasks):
    assert status_text(tasks) == "sft  ready\narm  waiting for sft"


def test_a_job_that_runs_has_step_rate_and_time_to_go(tasks):
    """16 prompts a step at 8 prompts a second are half a step a second, so 75 steps take 150 s."""
    begin(tasks[0].folder, step=25, prompts=16.0, pairs_per_second=8.0)
    with locked(tasks[0].folder):
        assert states(tasks)[0] == "running, step 25 of 100, 0.5 steps/s, 150 s to go"
    assert states(tasks)[0] == "stopped, step 25 of 100, 0.5 steps/s, 150 s to go"


def test_a_line_that_is_being_written_says_nothing(tasks):
    begin(tasks[0].folder)
    (tasks[0].folder / "metrics.jsonl").write_text('{"step": 2')
    assert states(tasks)[0] == "stopped"


def test_a_failure_has_its_line(tasks):
    begin(tasks[0].folder)
    (tasks[0].folder / "failed.json").write_text(json.dumps({"line": "too fast: lower it", "may_change": []}))
    assert states(tasks) == ["failed: too fast: lower it", "waiting for sft"]


def test_what_needs_a_finished_job_is_ready(tasks):
    begin(tasks[0].folder)
    (tasks[0].folder / "done.json").write_text('{"settings": {}}')
    assert states(tasks) == ["done", "ready"]
    many = Task("last", ("study",), None, ("arm", "other"))
    assert states([*tasks, many])[-1] == "waiting for arm and 1 more"
