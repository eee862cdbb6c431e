"""The commands of docs/pod.md: plans are valid, and launches print their jobs."""

import pathlib
import re
import shlex
import sys

import pytest

from alignment_gap.cli import plan
from alignment_gap.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "pod.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
PLANS = [words for words in COMMANDS if words[1] == "plan"]
LAUNCHES = [words for words in COMMANDS if words[1] == "launch"]


def test_every_command_is_a_plan_or_a_launch():
    assert len(COMMANDS) == len(PLANS) + len(LAUNCHES) and PLANS and LAUNCHES


@pytest.mark.parametrize("words", PLANS, ids=range(len(PLANS)))
def test_the_plan_could_be_made(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, _ = plan.read_config(["alignment-gap plan", *words[2:]])
    assert all(each.batch.batch % config.batch_unit == 0 for each in config.programs)


@pytest.mark.parametrize("words", LAUNCHES, ids=range(len(LAUNCHES)))
def test_the_launch_is_understood(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("gin", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert "--dry_run" in words or "--status" in words
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "ready" in said if "--status" in words else "gcloud_tpus queued-resources create" in said


def test_the_online_run_is_the_one_that_was_planned():
    planned, launched = PLANS[-1], next(words for words in LAUNCHES if "--gin.JUDGE=pod/judge" in words)
    for flag, macro in (("batch", "BATCH_SIZE"), ("microbatches", "MICROBATCHES"), ("dtype", "T5Config.dtype")):
        (value,) = (word.partition("=")[2] for word in planned if word.startswith(f"--{flag}="))
        assert f"--gin.{macro}={value}" in launched
