"""The commands of `--list`, run one by one, give the same bytes as the study, whichever command did a job."""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from studies import CACHE, assert_equal_jobs, unwritten

from alignment_gap.cli.main import main
from alignment_gap.study.run import open_studies

NANO = f"--config={pathlib.Path(__file__).with_name('nano.py')}"
KINDS = {"prepare", "train", "label", "generate", "evaluate"}
# A command that prints the words into which the shell has split it.
ECHO = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


@pytest.fixture
def alignment_gap(monkeypatch, capsys):
    """Runs a command in this process, and returns its output."""

    def run(words):
        monkeypatch.setattr(sys, "argv", ["alignment-gap", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    return run


def shell(commands, folder):
    """The words of commands, as a shell splits them."""
    (folder / "alignment-gap").write_text(ECHO)
    (folder / "alignment-gap").chmod(0o755)
    script = f"PATH={shlex.quote(str(folder))}:$PATH\n" + "\n".join(commands)
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def blocks(text):
    """The output of --list: state, folder, needs and command of every job, by name."""
    found = {}
    for line in text.splitlines():
        if not line.startswith(" "):
            name, _, state = line.partition(": ")
            found[name] = {"state": state}
        elif line.startswith("  alignment-gap "):
            found[name]["command"] = line.strip()
        else:
            key, _, value = line.strip().partition(" ")
            found[name][key] = value.strip()
    return found


def needed(job):
    """A job and all jobs that it needs, directly or not."""
    return {job.name}.union(*map(needed, job.needs))


@pytest.mark.slow
def test_the_commands_run_one_by_one_give_the_same_bytes(finished, tmp_path, alignment_gap, undrawn):
    """A shell splits every command into words. This process runs them; each command knows nothing but its words.

    The commands are the chain of jobs that ends with the evaluation of an online policy. The folders of the other
    jobs are copies from the finished study.
    """
    workdir = tmp_path / "a study"
    listing = ["study", NANO, f"--workdir={workdir}", CACHE, "--list"]
    listed = blocks(alignment_gap(listing))
    assert list(listed) == [*(job.name for job in finished.graph.jobs), "report"]
    assert {block["state"] for name, block in listed.items() if name not in ("seed0-data", "report")} == {"waiting"}
    assert not workdir.exists()
    chain = needed(finished.graph.job("seed0-evaluation-golden-ipo-beta0.1-lr0.01"))
    assert {job.kind.name for job in finished.graph.jobs if job.name in chain} == KINDS and len(chain) == 9
    for job in finished.graph.jobs:
        if job.name not in chain:
            shutil.copytree(job.folder, workdir / "jobs" / job.folder.name)
    for words in shell([listed[name]["command"] for name in listed if name in (*chain, "report")], tmp_path):
        alignment_gap([*words, CACHE])

    (ours,) = open_studies(finished.config, workdir)
    for job, theirs in zip(ours.graph.jobs, finished.graph.jobs, strict=True):
        assert job.state == "done" and job.name == theirs.name
        assert str(job.folder) == listed[job.name]["folder"]
        assert ", ".join(each.name for each in job.needs) == listed[job.name]["needs"].replace("nothing", "")
        if job.name in chain:
            assert_equal_jobs(job, theirs)
    for name in ("results.csv", *(f"figures/{path.name}" for path in (finished.workdir / "figures").iterdir())):
        assert (workdir / name).read_bytes() == (finished.workdir / name).read_bytes(), name

    with unwritten(workdir / "jobs"):
        said = alignment_gap(listing[:-1])
    assert said.count("finished before") == len(ours.graph.jobs)
    assert {block["state"] for name, block in blocks(alignment_gap(listing)).items() if name != "report"} == {"done"}


def test_a_job_of_a_study_by_its_name(tmp_path, alignment_gap):
    words = ["study", NANO, f"--workdir={tmp_path / 'study'}", CACHE]
    alignment_gap([*words, "--job=seed0-data"])
    listed = blocks(alignment_gap([*words, "--list"]))
    assert [listed[f"seed0-{name}"]["state"] for name in ("data", "sft", "golden")] == ["done", "ready", "waiting"]
    assert alignment_gap([*words, "--job=seed0-data"]) == "seed0-data: finished before\n"
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"jobs"}
