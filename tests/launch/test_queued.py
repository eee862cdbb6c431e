"""The script for a queued resource runs with a program in place of gcloud."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from alignment_gap.errors import UserError
from alignment_gap.launch import QueuedConfig, run_queued
from alignment_gap.launch.queued import queued_text

# Keeps the state of the queued resource in a file. Runs the command that ssh gives to the hosts, as one host.
# As many descriptions fail as the file "unknown" has lines. With the file "taken", another script creates the slice
# just before. With the file "drops", the connection to the next job is lost while it runs. With the file "slow", it
# takes a second to create the slice, and a second to delete it.
GCLOUD = """#!/bin/bash
set -f
echo $* >> {folder}/asked
state={folder}/state
case "$*" in
    *"describe"*)
        if [ -s {folder}/unknown ]; then sed -i 1d {folder}/unknown; echo "ERROR: UNAVAILABLE" >&2; exit 1; fi
        if [ ! -e $state ]; then echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; fi
        echo "WARNING: a new version can be had" >&2
        cat $state
        sed -i s/SUSPENDING/SUSPENDED/ $state ;;
    *"create"*)
        if [ -e {folder}/taken ]; then mv {folder}/taken $state; echo "ERROR: ALREADY_EXISTS" >&2; exit 1; fi
        if [ -e {folder}/slow ]; then touch {folder}/creating; sleep 1; fi
        echo {first} > $state ;;
    *"delete"*)
        if [ -e {folder}/slow ]; then sleep 1; fi
        kill -KILL $(cat {folder}/alignment-gap.pid 2> /dev/null) 2> /dev/null
        rm $state ;;
    *"ssh"*)
        for word in "$@"; do case "$word" in --command=*) command="${{word#--command=}}" ;; esac; done
        if [ -e {folder}/drops ] && [[ $command = *exec* ]]; then
            rm {folder}/drops
            bash -c "$command" &
            until [ -e {folder}/shared/held ]; do sleep 0.1; done
            exit 255
        fi
        bash -c "$command"
        status=$?
        # A spot slice is taken back.
        if [ $status -eq 75 ]; then echo SUSPENDING > $state; fi
        exit $status ;;
esac
"""

# Replaces alignment-gap on a host.
JOB = """#!/bin/bash
echo "$JAX_PLATFORMS $*" >> ran
if [ "$1" = fails ]; then exit 2; fi
if [ "$1" = saves -a ! -e saved ]; then touch saved; exit 75; fi
if [ -e held ]; then echo "error: the folder is in use by another run"; exit 2; fi
if [ "$1" = holds -a ! -e saved ]; then
    trap "sleep 1; rm held; touch saved; exit 75" TERM
    touch held
    for i in $(seq 600); do sleep 0.1; done
fi
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
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def lines():
        files = (tmp_path / "asked", tmp_path / "shared" / "ran")
        return [file.read_text().splitlines() if file.exists() else [] for file in files]

    install()
    lines.install = install
    return lines


# A launch as the command line runs it.
LAUNCH = """
import pathlib
from alignment_gap.interruption import signals_caught
from alignment_gap.launch import QueuedConfig, Task, run_queued
folder = pathlib.Path({folder!r})
with signals_caught():
    run_queued([Task("sft", ("holds",))], QueuedConfig(folder=str(folder / "shared"), look_every=1), folder / "logs")
"""


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


def test_a_job_whose_connection_is_lost_saves_and_ends_before_it_runs_again(gcloud, task_of, tmp_path, capfd):
    """The first process goes on without a connection, and takes a second to save; the next attempt waits for it."""
    (tmp_path / "drops").touch()
    run_queued([task_of("sft", "holds")], config(tmp_path), tmp_path / "logs")
    asked, ran = gcloud()
    assert len(ran) == 2 and (tmp_path / "shared" / "saved").exists()
    assert len([line for line in asked if " create " in line]) == 1 and " delete " in asked[-1]
    assert "in use" not in capfd.readouterr().out and not (tmp_path / "alignment-gap.pid").exists()


@pytest.mark.parametrize("by", ["ctrl-c", "SIGTERM"])
@pytest.mark.parametrize("while_", ["creating", "shared/held"])
def test_a_launch_that_is_interrupted_gives_its_slice_back(gcloud, tmp_path, by, while_):
    """While the slice is created, and while a job runs. Ctrl-c reaches all processes, SIGTERM the launch alone."""
    (tmp_path / "slow").touch()
    command = [sys.executable, "-c", LAUNCH.format(folder=str(tmp_path))]
    launch = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / while_).exists():
        assert launch.poll() is None
        time.sleep(0.05)
    if by == "ctrl-c":
        os.killpg(launch.pid, signal.SIGINT)
    else:
        launch.terminate()
    _, errors = launch.communicate(timeout=60)
    assert launch.returncode != 0 and "KeyboardInterrupt" in errors
    asked, _ = gcloud()
    assert " delete " in asked[-1] and not (tmp_path / "state").exists()


@pytest.mark.parametrize("state", ["ACTIVE", "SUSPENDED", "WAITING_FOR_RESOURCES"])
def test_a_slice_that_the_script_did_not_create_stays_as_it_is(gcloud, task_of, tmp_path, capfd, state):
    (tmp_path / "state").write_text(state)
    with pytest.raises(UserError, match=r"queued\.sh ended with exit status 1"):
        run_queued([task_of("sft")], config(tmp_path, zone="us-west4-a"), tmp_path / "logs")
    asked, ran = gcloud()
    assert ran == [] and len(asked) == 1 and (tmp_path / "state").read_text() == state
    assert (
        f"error: there is a queued resource alignment-gap already, in state {state}: give --queued.name=NAME, or if no "
        "other launch uses it, delete it: gcloud compute tpus queued-resources delete alignment-gap --force "
        "--zone=us-west4-a\n"
    ) in capfd.readouterr().err


@pytest.mark.parametrize("behaviour", ["ends", "saves"])
def test_a_slice_that_another_script_creates_first_stays_as_it_is(gcloud, task_of, tmp_path, behaviour):
    """Another script creates one between this one's look and its own request: its first request, or a later one."""
    if behaviour == "saves":
        script = queued_text([task_of("sft", "saves")], config(tmp_path), tmp_path).replace(
            "give_back || exit 1; found= ;;", f"give_back || exit 1; echo ACTIVE > {tmp_path}/taken; found= ;;"
        )
    else:
        (tmp_path / "taken").write_text("ACTIVE")
        script = queued_text([task_of("sft")], config(tmp_path), tmp_path)
    assert subprocess.run(["bash", "-c", script]).returncode == 1
    asked, ran = gcloud()
    assert (tmp_path / "state").read_text().strip() == "ACTIVE" and " create " in asked[-1]
    assert len(ran) == (1 if behaviour == "saves" else 0)


def test_a_state_that_cannot_be_read_is_no_missing_slice(gcloud, task_of, tmp_path, capfd):
    """Another script's slice is there. Two looks fail, the third one finds it."""
    (tmp_path / "state").write_text("ACTIVE")
    (tmp_path / "unknown").write_text("1\n2\n")
    with pytest.raises(UserError, match="exit status 1"):
        run_queued([task_of("sft")], config(tmp_path), tmp_path / "logs")
    assert [line.split()[3] for line in gcloud()[0]] == ["describe"] * 3
    error = capfd.readouterr().err
    assert error.count("UNAVAILABLE") == 2 and "there is a queued resource alignment-gap already" in error


def test_a_state_that_can_never_be_read_is_one_line(gcloud, task_of, tmp_path, capfd):
    (tmp_path / "unknown").write_text("\n" * 99)
    script = queued_text([task_of("sft")], config(tmp_path), tmp_path).replace("sleep 1\n", "sleep 0\n")
    assert subprocess.run(["bash", "-c", script]).returncode == 1
    assert [line.split()[3] for line in gcloud()[0]] == ["describe"] * 10
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: the state of the slice alignment-gap is not known: see the errors of gcloud, then launch again"
    )


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
