"""Runs a graph of jobs on Slurm: batch scripts with dependencies and requeueing; similar jobs form arrays."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from alignment_gap import checks
from alignment_gap.errors import UserError
from alignment_gap.interruption import TRY_AGAIN
from alignment_gap.launch.tasks import COMMAND, USER_ERROR, Task, waiting_tasks


@dataclasses.dataclass(frozen=True)
class SlurmConfig:
    """What each job requests from Slurm.

    Attributes:
      nodes: number of nodes for each job.
      processes: number of processes on each node; more than one if each gets its own devices.
      partition: partition of the jobs; None for Slurm's default.
      account: account that pays; None for the user's default.
      time: time limit of a job, in Slurm's notation; a job that reaches it is queued again and continues.
      gres: devices of each node, such as gpu:8; None for no devices.
      cpus: CPUs of each process; None for Slurm's default.
      memory: memory of each node, such as 64G; None for Slurm's default.
      grace: a job is asked to save this many seconds before its time limit.
      setup: shell command at the start of each job, for example to activate an environment.
      at_once: number of jobs of an array that run at once; None for no limit.
      retries: how often a job is queued again after its processes were killed or crashed.
    """

    nodes: int = 1
    processes: int = 1
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    gres: str | None = None
    cpus: int | None = None
    memory: str | None = None
    grace: int = 120
    setup: str | None = None
    at_once: int | None = None
    retries: int = 2

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "nodes", "processes", "cpus", "grace", "at_once")
        checks.at_least(self, 0, "retries")
        if self.memory is not None and re.fullmatch(r"\d+([KMGT]B?)?", self.memory, re.IGNORECASE) is None:
            raise UserError(f"memory is {self.memory!r}: write a number with K, M, G or T, such as 64G")
        limit = _seconds(self.time) if self.time is not None else math.inf
        if self.grace >= limit:
            raise UserError(
                f"grace is {self.grace} seconds, but time={self.time} gives a job {limit:g}: raise time or lower grace"
            )


def _seconds(time: str) -> float:
    """A time limit in seconds; raises UserError if it is not in Slurm's notation."""
    if time.lower() in ("infinite", "unlimited"):
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        raise UserError(f"time is {time!r}: write minutes, hours:minutes:seconds, or days-hours, such as 4:00:00")
    days, *parts = (None if each is None else int(each) for each in found.groups())
    numbers = [each for each in parts if each is not None]
    # Without days, one number is minutes and two are minutes and seconds; with days, they begin with hours.
    first = 3600 if days is not None or len(numbers) == 3 else 60
    units = [first, first / 60, first / 3600]
    seconds = 86400 * (days or 0) + sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return seconds or math.inf  # Slurm reads 0 as no limit.


@dataclasses.dataclass(frozen=True)
class Batch:
    """A Slurm job: one task, or an array of tasks with the same needs.

    Attributes:
      name: name of the batch.
      tasks: the tasks, one for each element of the array.
      needs: names of the tasks that must succeed first.
    """

    name: str
    tasks: tuple[Task, ...]
    needs: tuple[str, ...]


def batches(tasks: Sequence[Task]) -> list[Batch]:
    """The tasks that are not done, each after the tasks that it needs; similar tasks become arrays."""
    alike: dict[tuple[tuple[str, ...], str, bool], list[Task]] = collections.defaultdict(list)
    for task in waiting_tasks(tasks):
        alike[tuple(sorted(task.needs)), task.words[0], task.processes].append(task)
    made = []
    for (needs, command, _), group in alike.items():
        name = group[0].name if len(group) == 1 else f"{command}-{len(group)}-{group[0].name}"
        made.append(Batch(name, tuple(group), needs))
    return [*_ordered(made)]


def _ordered(made: Sequence[Batch]) -> Iterator[Batch]:
    left, seen = list(made), set[str]()
    while left:
        ready = [batch for batch in left if seen.issuperset(batch.needs)]
        yield from ready
        seen.update(task.name for batch in ready for task in batch.tasks)
        left = [batch for batch in left if batch not in ready]


def script(batch: Batch, config: SlurmConfig, logs: Path) -> str:
    """The batch script, without its dependencies, because Slurm assigns their numbers."""
    is_array, together = len(batch.tasks) > 1, batch.tasks[0].processes
    nodes, processes = (config.nodes, config.processes) if together else (1, 1)
    options = {
        "job-name": batch.name,
        "output": logs / ("%x-%A_%a.log" if is_array else "%x-%j.log"),
        "open-mode": "append",
        "nodes": nodes,
        "ntasks-per-node": processes,
        "partition": config.partition,
        "account": config.account,
        "time": config.time,
        "gres": config.gres,
        "cpus-per-task": config.cpus,
        "mem": config.memory,
        # Slurm sends the signal to the job's steps, which are the processes that save.
        "signal": f"TERM@{config.grace}",
    }
    if is_array:
        limit = f"%{config.at_once}" if config.at_once else ""
        options["array"] = f"0-{len(batch.tasks) - 1}{limit}"
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None)]
    lines += ["#SBATCH --requeue", *([config.setup] if config.setup else [])]
    coordinator = ["--coordinator=auto"] if nodes * processes > 1 else []
    commands = [
        shlex.join(["srun", "--kill-on-bad-exit=1", *COMMAND, *task.words, *coordinator]) for task in batch.tasks
    ]
    if is_array:
        cases = [f"{number}) {command} ;;" for number, command in enumerate(commands)]
        lines += ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
    else:
        lines += commands
    # The last element of an array has the number of the whole array, which would be queued again with it.
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if is_array else "$SLURM_JOB_ID"
    lines += [
        "status=$?",
        f"# {TRY_AGAIN}: the job was asked to end, has saved, and continues when it runs again.",
        f"if [ $status -eq {TRY_AGAIN} ]; then scontrol requeue {number}; exit $status; fi",
        f"# {USER_ERROR}: another attempt would fail again. Any other status: processes were killed or crashed.",
        "# These are counted in a file, because Slurm's count includes preemptions and time limits.",
        f"crashes={shlex.quote(str(logs))}/{number}.crashes",
        f"if [ $status -ne 0 -a $status -ne {USER_ERROR} ]; then",
        '    echo $status >> "$crashes"',
        f'    if [ $(wc -l < "$crashes") -le {config.retries} ]; then scontrol requeue {number}; exit $status; fi',
        "fi",
        'rm -f "$crashes"',
        "exit $status",
    ]
    return "\n".join(lines) + "\n"


def slurm_text(tasks: Sequence[Task], config: SlurmConfig, logs: Path) -> str:
    """The scripts that would be submitted, each with its sbatch command."""
    blocks = []
    for batch in batches(tasks):
        after = f" --dependency=afterok:{':'.join(f'<{name}>' for name in batch.needs)}" if batch.needs else ""
        blocks.append(f"# sbatch{after}\n{script(batch, config, logs)}")
    return "\n".join(blocks) or "all jobs are done"


def submit_slurm(tasks: Sequence[Task], config: SlurmConfig, logs: Path, say: Callable[[str], None] = print) -> None:
    """Submits every task that is not done, after the tasks that it needs.

    Raises:
      UserError: Slurm is not installed, or refuses a job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("this machine has no sbatch: launch from a login node of the cluster, or give --dry_run")
    logs.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, str] = {}
    for batch in batches(tasks):
        needed = sorted(numbers[name] for name in batch.needs)
        # Slurm removes jobs whose dependencies have failed from the queue.
        after = [f"--dependency=afterok:{':'.join(needed)}", "--kill-on-invalid-dep=yes"] if needed else []
        done = subprocess.run(
            ["sbatch", "--parsable", *after],
            input=script(batch, config, logs.absolute()),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"sbatch refused {batch.name}: {done.stderr.strip().splitlines()[-1]}")
        number = done.stdout.strip().partition(";")[0]
        # A job waits for the elements that it needs alone: the failure of another element must not remove it.
        is_array = len(batch.tasks) > 1
        numbers |= {task.name: f"{number}_{i}" if is_array else number for i, task in enumerate(batch.tasks)}
        say(f"{number}  {batch.name}" + (f" after {', '.join(needed)}" if needed else ""))
