"""Jobs of a graph at the same time: their order, a failure (running jobs finish), and a stop by a signal."""

import dataclasses
import signal
import threading
import time

import pytest

from alignment_gap import interruption
from alignment_gap.errors import UserError
from alignment_gap.interruption import signals_caught
from alignment_gap.jobs.folder import Job, Kind, Opened
from alignment_gap.study.run import run_jobs


@dataclasses.dataclass(frozen=True)
class Named:
    name: str


@pytest.fixture
def job_of(tmp_path):
    """Makes a job that calls `work`."""

    def make_job(name, work, *needs):
        opened = Opened({}, lambda folder, open_bar: work(open_bar))
        kind = Kind("told", "told", Named, lambda config: opened, lambda folder: "")
        return Job(name, kind, Named(name), tmp_path / name, needs)

    return make_job


def run(jobs, at_once):
    run_jobs(jobs, at_once, lambda line: None)


def test_two_that_do_not_need_each_other_run_together_and_what_needs_both_comes_after(job_of):
    together, ended = threading.Barrier(2, timeout=60), []

    def meet(name):
        together.wait()
        ended.append(name)

    first, second = (job_of(name, lambda _, name=name: meet(name)) for name in ("first", "second"))
    last = job_of("last", lambda _: ended.append("last"), first, second)
    run([first, second, last], at_once=2)
    assert ended[2:] == ["last"] and {*ended[:2]} == {"first", "second"}
    assert all(job.is_done for job in (first, second, last))


def test_no_more_run_than_were_asked_for(job_of):
    running, most = [], []

    def work(_):
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()

    run([job_of(f"job{number}", work) for number in range(6)], at_once=2)
    assert max(most) == 2 and len(most) == 6


@pytest.mark.parametrize("at_once", [1, 2])
def test_after_a_failure_none_is_started_and_what_runs_ends(job_of, at_once):
    def fail(_):
        raise UserError("nothing works")

    def outlast(_):
        while not (fails.folder / "failed.json").exists():
            time.sleep(0.01)
        time.sleep(0.5)

    fails = job_of("fails", fail)
    jobs = [fails, job_of("beside", outlast), job_of("later", lambda _: None)]
    with pytest.raises(UserError, match=r"^nothing works$"):
        run(jobs, at_once)
    assert [job.is_done for job in jobs] == [False, at_once == 2, False]


def test_a_signal_ends_work_in_threads_at_the_next_update_of_its_bar(job_of):
    def work(open_bar):
        with open_bar(None, "work", "steps") as bar:
            started.set()
            for _ in range(6000):
                time.sleep(0.01)
                bar.update(1)

    started, jobs = threading.Event(), [job_of("first", work), job_of("second", work), job_of("later", work)]

    def send():
        started.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    sender = threading.Thread(target=send)
    with signals_caught():
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            run(jobs, at_once=2)
    sender.join()
    assert not any(job.is_done for job in jobs) and not jobs[2].folder.exists()


def test_a_loop_that_asks_is_not_ended_by_its_bar():
    with signals_caught(), interruption.watching():
        signal.raise_signal(signal.SIGINT)
        interruption.check_not_requested()
        assert interruption.requested(1)
        found = []
        beside = threading.Thread(target=lambda: found.append(raised(interruption.check_not_requested)))
        beside.start()
        beside.join()
        assert found == [KeyboardInterrupt]


def raised(run):
    try:
        run()
    except BaseException as error:
        return type(error)
