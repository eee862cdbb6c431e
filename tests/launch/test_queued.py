"""The script for a queued resource runs with a program in place of gcloud."""

import pathlib
import subprocess

import pytest

from alignment_gap.errors import UserError
from alignment_gap.launch import QueuedConfig, run_queued
from alignment_gap.launch.queued import queued_text

# Keeps the state of the queued resource in a file. Runs the command that ssh gives to the hosts, as one host.
GCLOUD = """#!/bin/bash
echo "$*" >> {folder}/asked
state={folder}/state
case "$*" in
    *"describe"*) [ -e $state ] && cat $state; [ -e $state ] ;;
    *"create"*) echo {first} > $state ;;
    *"delete"*) rm $state ;;
    *"ssh"*)
        for word in "$@"; do case "$word" in --command=*) command="${{word#--command=}}" ;; esac; done
        bash -c "$command"
        status=$?
        # A spot slice is taken back.
        if [ $status -eq 75 ]; then echo SUSPENDED > $state; fi
        exit $status ;;
esac
"""

# Replaces alignment-gap on a host.
JOB = """#!/bin/bash
echo "$JAX_PLATFORMS $*" >> ran
if [ "$1" = fails ]; then exit 2; fi
if [ "$1" = saves -a ! -e saved ]; then touch saved; exit 75; fi
"""


@pytest.fixture
def gcloud(tmp_path, monkeypatch):
    """Puts the programs into PATH; returns the requests to gcloud, and the commands that ran on the host."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "shared").mkdir()

    def install(first="ACTIVE"):
        for name, text in (("gcloud", GCLOUD.format(folder=tmp_path, first=first)), ("alignment-gap", JOB)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def lines():
        files = (tmp_path / "asked", tmp_path / "shared" / "ran")
        return [file.read_text().splitlines() if file.exists() else [] for file in files]

    install()
    lines.install = install
    return lines


def config(tmp_path, **settings):
    return QueuedConfig(folder=str(tmp_path / "shared"), look_every=1, **settings)


def test_jobs_run_in_order_on_all_hosts_and_the_slice_is_given_back(gcloud, task_of, tmp_path, capfd):
    tasks = [task_of("data", "prepares", processes=False), task_of("sft", "trains", "data")]
    settings = config(tmp_path, zone="us-west4-a", project="p", spot=True, setup="echo it is set up")
    run_queued(tasks, settings, tmp_path / "logs")
    asked, ran = gcloud()
    create = next(line for line in asked if " create " in line)
    assert create.startswith("compute tpus queued-resources create alignment-gap --node-id=alignment-gap ")
    assert "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot" in create
    assert all(line.endswith("--zone=us-west4-a --project=p") for line in asked)
    assert ran == [f"cpu prepares {tasks[0].folder}", f" trains {tasks[1].folder} --coordinator=auto"]
    ssh = [line for line in asked if " ssh " in line]
    assert [line.partition("--worker=")[2].split()[0] for line in ssh] == ["all", "0", "all"]
    assert "delete" in asked[-1] and not (tmp_path / "state").exists()
    assert capfd.readouterr().out.splitlines().count("it is set up") == 1


def test_a_slice_that_was_taken_back_is_asked_for_again_and_set_up_again(gcloud, task_of, tmp_path, capfd):
    run_queued([task_of("sft", "saves")], config(tmp_path, setup="echo it is set up"), tmp_path / "logs")
    asked, ran = gcloud()
    assert len(ran) == 2 and len([line for line in asked if " create " in line]) == 2
    assert capfd.readouterr().out.splitlines().count("it is set up") == 2


def test_a_job_that_fails_ends_the_script_and_gives_the_slice_back(gcloud, task_of, tmp_path, capfd):
    tasks = [task_of("bad", "fails"), task_of("next", "ends")]
    with pytest.raises(UserError, match=r"queued\.sh ended with exit status 2"):
        run_queued(tasks, config(tmp_path), tmp_path / "logs")
    asked, ran = gcloud()
    assert len(ran) == 1 and "delete" in asked[-1]
    assert "error: bad failed with exit status 2: fix it and launch again" in capfd.readouterr().err


def test_a_slice_that_cannot_be_had(gcloud, task_of, tmp_path, capfd):
    gcloud.install("FAILED")
    with pytest.raises(UserError, match="exit status 1"):
        run_queued([task_of("a")], config(tmp_path), tmp_path / "logs")
    assert "error: the slice alignment-gap is not available" in capfd.readouterr().err and gcloud()[1] == []


def test_words_stay_whole(gcloud, task_of, tmp_path):
    task = task_of("a")
    odd = "a \"b\" $HOME 'c'"
    run_queued([type(task)("a", ("ends", odd))], config(tmp_path, topology="v5e:2x4"), tmp_path / "logs")
    assert gcloud()[1] == [f" ends {odd}"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topology": "tpu7x:2x2x1"}, "is not offered as a queued resource: use the engine jobset"),
        ({"retries": -1}, "retries is -1"),
        ({"look_every": 0}, "look_every is 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        QueuedConfig(**settings)


def test_what_is_missing_is_one_line(task_of, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"queued\.folder is not set: add --queued\.folder=FOLDER"):
        queued_text([task_of("a")], QueuedConfig(), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="this machine has no gcloud"):
        run_queued([task_of("a")], config(tmp_path), tmp_path / "logs")


def test_the_script_is_sound(task_of, tmp_path):
    path = tmp_path / "script.sh"
    path.write_text(queued_text([task_of("a")], config(tmp_path), tmp_path))
    assert subprocess.run(["bash", "-n", path]).returncode == 0 and pathlib.Path(path).read_text()[:2] == "#!"
