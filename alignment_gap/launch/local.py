"""Runs a graph of jobs on this machine: several at once, each in its own processes, like a small pod."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import graphlib
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alignment_gap import checks
from alignment_gap.errors import UserError
from alignment_gap.launch.tasks import COMMAND, USER_ERROR, Task, waiting_tasks

# Seconds between two looks at a job's processes, and seconds that the others get to end after one has failed.
_LOOK_EVERY, _GRACE = 0.1, 30.0


@dataclasses.dataclass(frozen=True)
class LocalConfig:
    """How jobs run on this machine.

    Attributes:
      jobs: number of jobs that run at once.
      processes: number of processes of each job that can have several.
      retries: how often a job is tried again after its processes were killed or crashed.
    """

    jobs: int = 1
    processes: int = 1
    retries: int = 2

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "jobs", "processes")
        checks.at_least(self, 0, "retries")


class _Processes:
    """The running processes; all get a signal when the engine has to end."""

    def __init__(self) -> None:
        self.stopped, self._lock, self._running = False, threading.Lock(), set[subprocess.Popen[bytes]]()

    @contextlib.contextmanager
    def started(self, commands: Sequence[Sequence[str]], log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
        """Starts processes that write to one log; at the end, kills those that still run."""
        with log.open("ab") as file, self._lock:
            # In a session of its own, a process gets only the engine's signals, not those of the terminal as well: a
            # second signal would end it before it has saved.
            begun = [
                subprocess.Popen(each, stdout=file, stderr=file, start_new_session=True)
                for each in ([] if self.stopped else commands)
            ]
            self._running.update(begun)
        try:
            yield begun
        finally:
            for process in begun:
                process.kill()
                process.wait()
            with self._lock:
                self._running.difference_update(begun)

    def stop(self) -> None:
        """Asks all processes to save and end; no more processes start."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.terminate()


def run_local(tasks: Sequence[Task], config: LocalConfig, logs: Path, say: Callable[[str], None] = print) -> None:
    """Runs every task that is not done, after the tasks that it needs; a failed task stops only tasks that need it.

    Args:
      tasks: the tasks of the graph.
      config: how many jobs run at once, and in how many processes.
      logs: folder for the output of each task.
      say: prints a line.

    Raises:
      UserError: tasks failed; the message has the error line of the first one.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = {task.name: task for task in waiting_tasks(tasks)}
    order = graphlib.TopologicalSorter({name: task.needs for name, task in waiting.items()})
    order.prepare()
    failed: dict[str, str] = {}
    processes, running = _Processes(), dict[concurrent.futures.Future[str], str]()
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        try:
            while order.is_active():
                for name in order.get_ready():
                    running[pool.submit(_attempt, waiting[name], config, logs, processes, say)] = name
                if not running:
                    break  # All remaining tasks need one that failed.
                ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in ended:
                    name = running.pop(future)
                    if line := future.result():
                        failed[name] = line
                        say(f"{name}: failed: {line}")
                    else:
                        order.done(name)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.stop()
    if failed:
        first, left = next(iter(failed)), len(waiting) - len(failed)
        raise UserError(
            f"{len(failed)} of {len(waiting)} jobs failed, first {first}: {failed[first]} (its output is in "
            f"{logs / waiting[first].file_name}.log; {left} were done or need a failed job): fix it and launch again"
        )


def _attempt(task: Task, config: LocalConfig, logs: Path, processes: _Processes, say: Callable[[str], None]) -> str:
    """Runs a task, and again if its processes died; returns the last line of its output if it failed, else ""."""
    log = logs / f"{task.file_name}.log"
    earlier = log.stat().st_size if log.exists() else 0
    for attempt in range(1 + config.retries):
        say(f"{task.name}: started" + (f" again, for the {attempt}. time" if attempt else ""))
        start = time.monotonic()
        status = _run(task, config, log, processes)
        if status == 0:
            say(f"{task.name}: done in {time.monotonic() - start:.0f} s")
            return ""
        if processes.stopped or status == USER_ERROR:
            break
        say(f"{task.name}: a process ended with exit status {status}")
    return _last_line(log, earlier) or f"exit status {status}"


def _run(task: Task, config: LocalConfig, log: Path, processes: _Processes) -> int:
    """Runs one attempt; returns 0, or the exit status of the process that failed first; the others then end too."""
    count = config.processes if task.processes else 1
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"] if count > 1 else []
    numbered = [[*together, f"--process={number}"] if together else [] for number in range(count)]
    failed, deadline = 0, float("inf")
    with processes.started([[*COMMAND, *task.words, *words] for words in numbered], log) as begun:
        while True:
            statuses = [process.poll() for process in begun]
            if not failed and any(statuses):
                failed, deadline = next(filter(None, statuses)), time.monotonic() + _GRACE
            if None not in statuses or time.monotonic() > deadline:
                return failed if begun else 1
            time.sleep(_LOOK_EVERY)


def local_text(tasks: Sequence[Task], config: LocalConfig, logs: Path) -> str:
    """The commands that would run, each after the commands that it needs."""
    lines = []
    for task in waiting_tasks(tasks):
        needs = f" after {', '.join(task.needs)}" if task.needs else ""
        count = config.processes if task.processes else 1
        lines.append(f"# {task.name}{needs}, in {count} process{'es' if count > 1 else ''}")
        lines.append(shlex.join(["alignment-gap", *task.words]))
    return "\n".join(lines) or "all jobs are done"


def _last_line(log: Path, earlier: int) -> str:
    """The last error, or the last line, of a log after the bytes that earlier launches wrote."""
    lines = log.read_bytes()[earlier:].decode(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
