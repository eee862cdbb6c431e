"""The engine for this machine, with commands in place of jobs."""

import os
import signal
import sys
import threading
import time

import pytest

from alignment_gap.errors import UserError
from alignment_gap.launch import local
from alignment_gap.launch.local import LocalConfig, local_text, run_local


def launch(tasks, folder, **settings):
    said = []
    try:
        run_local(tasks, LocalConfig(**settings), folder / "logs", said.append)
    except UserError as error:
        return said, str(error)
    return said, None


def test_jobs_come_after_what_they_need_and_only_once(task_of, attempts, tmp_path):
    tasks = [task_of("c", "ends", "a", "b"), task_of("b", "ends", "a"), task_of("a"), task_of("d", "ends", "c")]
    assert launch(tasks, tmp_path, jobs=2)[1] is None
    assert attempts() == {"a": 1, "b": 1, "c": 1, "d": 1} and list(attempts()) == ["a", "b", "c", "d"]
    assert launch(tasks, tmp_path, jobs=2) == ([], None)
    assert sum(attempts().values()) == 4


def test_a_job_that_fails_stops_what_needs_it_and_nothing_else(task_of, attempts, tmp_path):
    tasks = [task_of("a", "fails"), task_of("b", "ends", "a"), task_of("c"), task_of("d", "ends", "c")]
    said, error = launch(tasks, tmp_path)
    assert attempts() == {"a": 1, "c": 1, "d": 1}
    assert error.startswith("1 of 4 jobs failed, first a: error: it fails: mend it (its output is in ")
    assert "a: failed: error: it fails: mend it" in said
    assert "error: it fails" in (tmp_path / "logs" / "a.log").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_whose_process_was_killed_is_run_again(processes, task_of, attempts, tmp_path, monkeypatch):
    """If one of two processes is killed, the other waits forever, until the engine ends it."""
    monkeypatch.setattr(local, "_GRACE", 1.0)
    said, error = launch([task_of("a", "dies")], tmp_path, processes=processes)
    assert error is None and attempts() == {"a": 2 * processes}
    assert "a: a process ended with exit status -9" in said
    assert "a: started again, for the 1. time" in said


def test_the_process_that_failed_first_decides(task_of, attempts, tmp_path):
    """The other process ends a second later, with the status of a user error, because it watches the first one."""
    said, error = launch([task_of("a", "dies-with-a-line")], tmp_path, processes=2)
    assert error is None and attempts() == {"a": 4}
    assert "a: a process ended with exit status -9" in said


def test_there_is_an_end_to_attempts(task_of, attempts, tmp_path):
    _, error = launch([task_of("a", "dies")], tmp_path, retries=0)
    assert "first a: exit status -9" in error and attempts() == {"a": 1}


def test_the_line_of_an_earlier_launch_is_not_the_reason(task_of, attempts, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("error: the disk was full\n")
    _, error = launch([task_of("a", "dies")], tmp_path, retries=0)
    assert "first a: exit status -9" in error


def test_the_signals_of_a_terminal_do_not_reach_the_processes_of_a_job(tmp_path):
    """A terminal sends Ctrl-c to every process of its session, and the engine sends SIGTERM too."""
    command = [sys.executable, "-c", "import os; print(os.getsid(0))"]
    with local._Processes().started([command], tmp_path / "log") as (process,):
        process.wait()
    assert int((tmp_path / "log").read_text()) == process.pid != os.getsid(0)


def test_a_command_that_cannot_be_split_has_one_process(task_of, attempts, tmp_path):
    launch([task_of("a", processes=False), task_of("b")], tmp_path, processes=2)
    assert attempts() == {"a": 1, "b": 2}


@pytest.fixture
def interruptible():
    """Listens to Ctrl-c: background jobs of a shell ignore it, and the tests may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_engine_that_is_interrupted_has_its_jobs_save(task_of, tmp_path):
    """Only the engine receives Ctrl-c. The next launch continues."""
    folder = tmp_path / "jobs" / "a"

    def interrupt():
        while not (folder / "job.json").exists():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        launch([task_of("a", "saves"), task_of("b", "ends", "a")], tmp_path)
    assert (folder / "saved-0").exists() and not (folder / "done.json").exists()
    assert not (tmp_path / "jobs" / "b").exists()
    assert launch([task_of("a", "saves"), task_of("b", "ends", "a")], tmp_path)[1] is None


def test_what_would_be_run_is_printed(task_of, tmp_path):
    text = local_text([task_of("a"), task_of("b", "ends", "a")], LocalConfig(processes=2), tmp_path)
    assert text.splitlines()[::2] == ["# a, in 2 processes", "# b after a, in 2 processes"]
    assert text.splitlines()[1] == f"alignment-gap ends {tmp_path / 'jobs' / 'a'}"
    assert not (tmp_path / "jobs").exists()


@pytest.mark.parametrize("settings", [{"jobs": 0}, {"processes": 0}, {"retries": -1}])
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=f"{next(iter(settings))} is"):
        LocalConfig(**settings)
