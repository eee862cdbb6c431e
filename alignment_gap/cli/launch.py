"""Run a command on an engine. A study is split into its jobs, which run at the same time if possible.

alignment-gap launch study --config=configs/study/tiny.py --workdir=runs/study
alignment-gap launch --engine=local --local.jobs=2 study --config=configs/study/tiny.py --workdir=runs/study
alignment-gap launch --engine=slurm --slurm.partition=gpu --slurm.gres=gpu:8 --slurm.time=4:00:00 \\
    train --gin_file=gin/runs/online_ipo.gin --gin.PROMPTS=pairs --gin.START=sft --gin.JUDGE=proxy --workdir=online
alignment-gap launch --engine=jobset --jobset.image=IMAGE --jobset.volume=CLAIM --jobset.topology=v5e:4x4 --dry_run \\
    study --config=configs/study/tiny.py
alignment-gap launch --status study --config=configs/study/tiny.py --workdir=runs/study
alignment-gap launch --sweep=LEARNING_RATE=1e-5,3e-5,1e-4 train --gin_file=gin/runs/offline_ipo.gin \\
    --gin.DATASET=pairs --gin.START=sft --workdir=runs/sweep

Finished jobs do not run again. Write the flags of launch before the command, and the command's own flags after it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from alignment_gap import launch
from alignment_gap.checks import nearest, one_of
from alignment_gap.cli import gin_files, train
from alignment_gap.cli.flags import define_config, parse, read_config
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at
from alignment_gap.jobs.folder import finished_with, settings_of
from alignment_gap.launch import JobSetConfig, LocalConfig, QueuedConfig, SlurmConfig, Task

# For each engine: a function that describes what would run, and a function that runs it.
_FUNCTIONS: dict[str, tuple[Callable[..., str], Callable[..., None]]] = {
    "local": (launch.local_text, launch.run_local),
    "slurm": (launch.slurm_text, launch.submit_slurm),
    "jobset": (launch.jobset_text, launch.submit_jobset),
    "queued": (launch.queued_text, launch.run_queued),
}
ENGINES = ("here", *_FUNCTIONS)
# Commands that fill one folder: the flag of the folder, and its default.
_FOLDERS = {"train": ("workdir", train.WORKDIR), "evaluate": ("output", None), "data": ("output", None)}
LAUNCHED = (*_FOLDERS, "study")
# The commands of data that fill a folder.
_OF_DATA = ("prepare", "label", "generate", "compose", "baselines", "reference")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where jobs run.

    Attributes:
      engine: "here" (this process, one job after the other), "local" (processes on this machine), "slurm", "jobset"
        (TPU slices in a Kubernetes cluster) or "queued" (a TPU slice as a queued resource).
      local: settings of the engine local.
      slurm: settings of the engine slurm.
      jobset: settings of the engine jobset.
      queued: settings of the engine queued.
    """

    engine: str = "here"
    local: LocalConfig = LocalConfig()
    slurm: SlurmConfig = SlurmConfig()
    jobset: JobSetConfig = JobSetConfig()
    queued: QueuedConfig = QueuedConfig()

    def __post_init__(self) -> None:
        """Raises UserError for an unknown engine, or for settings of an engine that is not used."""
        one_of(self, ENGINES, "engine")
        for name in _FUNCTIONS:
            settings = getattr(self, name)
            if name != self.engine and settings != type(settings)():
                raise UserError(f"--{name}. settings are given, but the engine is {self.engine}: add --engine={name}")


def main(arguments: list[str]) -> None:
    """Launches a command; raises UserError for flags that cannot be used, before anything runs."""
    first = next((i for i, word in enumerate(arguments[1:], 1) if not word.startswith("-")), len(arguments))
    parsed = parse(arguments[:first], _define, __doc__)
    if parsed is None:
        return
    values, _ = parsed
    config, words = read_config(values, LaunchConfig, {}), arguments[first:]
    if not words:
        raise UserError("there is nothing to launch: add a command, such as study --config=configs/study/tiny.py")
    if words[0] not in LAUNCHED:
        raise UserError(f"cannot launch {words[0]!r}: {nearest(words[0], LAUNCHED)}")
    if values.sweep and words[0] != "train":
        raise UserError(f"--sweep needs the command train, not {words[0]}: leave --sweep out")
    for word in words[1:]:
        if word.startswith("--") and (name := word[2:].partition("=")[0]) in values:
            raise UserError(f"--{name} is a flag of launch: write it before {words[0]}")
    runs_here = config.engine == "here" and not (values.status or values.dry_run or values.sweep)
    if runs_here or {"--help", "-h"} & {*words}:
        importlib.import_module(f"alignment_gap.cli.{words[0]}").main([f"alignment-gap {words[0]}", *words[1:]])
        return
    if words[0] in _FOLDERS:
        words = _joined(words, _FOLDERS[words[0]][0])
    # This process would run the same jobs as "local", one after the other.
    engine = "local" if config.engine == "here" else config.engine
    if values.sweep:
        tasks, logs = _sweep_tasks(values.sweep, words)
    else:
        tasks, logs = _tasks(words, is_elsewhere=values.status or engine != "local")
    if values.status:
        print(launch.status_text(tasks))
        return
    text, run = _FUNCTIONS[engine]
    settings = getattr(config, engine)
    if values.dry_run:
        print(text(tasks, settings, logs))
    else:
        run(tasks, settings, logs)


def _define(values: flags.FlagValues) -> None:
    define_config(values, LaunchConfig, {})
    flags.DEFINE_boolean("dry_run", False, "Print what would run or be submitted, and do nothing.", flag_values=values)
    flags.DEFINE_boolean("status", False, "Print the state of each job, and do nothing.", flag_values=values)
    text = "NAME=VALUE,VALUE,...: run a training job for each value of --gin.NAME, each in its own folder in workdir."
    flags.DEFINE_string("sweep", None, text, flag_values=values)


def _tasks(words: Sequence[str], *, is_elsewhere: bool) -> tuple[list[Task], Path]:
    """The tasks of a command, and the folder for their output.

    Raises:
      UserError: the job refuses its flags or settings, or a gin file is not here and the job does not run elsewhere.
    """
    if words[0] == "study":
        return _study_tasks(words)
    path = _folder(words)
    processes = words[:2] != ["data", "prepare"]
    try:
        settings = _settings(words)
    except gin_files.NotHere as error:
        # Without its settings, a finished folder does not tell whether this job made it.
        if not is_elsewhere or finished_with(path) is not None:
            raise
        print(f"{path.name}: its settings are not checked here: {error}", file=sys.stderr)
        settings = None
    return [Task(path.name, tuple(words), path, processes=processes, settings=settings)], _logs(path)


def _joined(words: Sequence[str], flag: str) -> list[str]:
    """The words with `--FLAG VALUE` written as `--FLAG=VALUE`, which the command reads alike."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in (f"--{flag}", f"-{flag}"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _folder(words: Sequence[str]) -> AnyPath:
    """The folder that a command fills; raises UserError if it names none."""
    flag, default = _FOLDERS[words[0]]
    given = [word.partition("=")[2] for word in words if word.lstrip("-").startswith(f"{flag}=")]
    folder = given[-1] if given else default
    if folder is None:
        raise UserError(f"--{flag} is not set: add --{flag}=FOLDER")
    return at(folder)


def _settings(words: Sequence[str]) -> dict[str, Any] | None:
    """The settings of a command's job; None after help. Raises UserError if the job refuses its flags or settings."""
    from alignment_gap.cli.job import read_command

    command = words[: 2 if words[0] == "data" else 1]
    if command[0] == "data" and command[-1] not in _OF_DATA:
        raise UserError(f"cannot launch {' '.join(command)!r}: {nearest(command[-1], _OF_DATA)}")
    kind = getattr(importlib.import_module(f"alignment_gap.jobs.{command[-1]}"), command[-1].upper())
    arguments = [f"alignment-gap {' '.join(command)}", *words[len(command) :]]
    parsed = train.read_job(arguments) if kind.command == "train" else read_command(kind, arguments, None)
    return None if parsed is None else settings_of(kind, parsed[1])


def _sweep_tasks(sweep: str, words: Sequence[str]) -> tuple[list[Task], Path]:
    """The tasks of a sweep: a training job for each value, then the page that compares them.

    Raises:
      UserError: a value is missing or repeated, or the job refuses it.
    """
    setting, _, listed = sweep.partition("=")
    values = [value.strip() for value in listed.split(",")]
    if not setting or not all(values):
        raise UserError(f"--sweep={sweep}: write NAME=VALUE,VALUE, such as LEARNING_RATE=1e-5,3e-5,1e-4")
    if fixed := [word for word in words if word.startswith(f"--gin.{setting}=")]:
        raise UserError(f"--sweep={sweep}: the command fixes the setting by {fixed[0]}: leave one of them out")
    whole = _folder(words)
    given = [word for word in words if not word.lstrip("-").startswith("workdir=")]
    tasks = dict[str, Task]()
    for value in values:
        name = _sweep_name(setting, value)
        if name in tasks:
            raise UserError(f"--sweep={sweep}: {value} comes twice: give each value once")
        folder = whole / name
        own = (*given, f"--gin.{setting}={value}", f"--workdir={folder}")
        tasks[name] = Task(name, own, folder, settings=_settings(own))  # Raises if the job refuses the value.
    runs = ",".join(str(task.folder) for task in tasks.values())
    report = ("report", f"--runs={runs}", f"--workdir={whole / 'compared'}")
    return [*tasks.values(), Task("report", report, None, tuple(tasks), processes=False)], _logs(whole, "logs")


def _sweep_name(setting: str, value: str) -> str:
    """The name of a value's folder, such as lr1e-05."""
    with contextlib.suppress(ValueError):
        value = f"{float(value):g}"
    name = setting.rpartition(".")[2].lower()
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{'lr' if name == 'learning_rate' else name}{value}")


def _logs(folder: AnyPath, *names: str) -> Path:
    """The local folder for the output of jobs: in `folder`, by these names, if `folder` is local."""
    return folder.joinpath(*names) if isinstance(folder, Path) else Path("logs", folder.name)


def _study_tasks(words: Sequence[str]) -> tuple[list[Task], Path]:
    from alignment_gap.cli import study as command

    parsed = command.read([f"alignment-gap {words[0]}", *words[1:]], command.define, command.__doc__)
    assert parsed is not None
    values, settings = parsed

    from alignment_gap.configuration import from_dict
    from alignment_gap.jobs.prepare import PREPARE
    from alignment_gap.study.config import StudyConfig
    from alignment_gap.study.run import check_config, open_studies

    config, workdir = from_dict(StudyConfig, settings), at(values.workdir)
    tasks: dict[AnyPath | str, Task] = {}
    sizes = [[f"--config.sizes=({size!r},)"] for size in config.sizes] or [[]]
    for study, size in zip(open_studies(config, workdir), sizes, strict=True):
        check_config(study, update=values.update)  # Its report would refuse the folder after all jobs.
        prefix = f"{study.workdir.name}-" if size else ""
        for job in study.graph.jobs:
            # Studies of different sizes share folders; the first study's name is used.
            needs = tuple(tasks[need.folder].name for need in job.needs)
            tasks.setdefault(
                job.folder, Task(prefix + job.name, job.words, job.folder, needs, processes=job.kind is not PREPARE)
            )
        report = (*words, *size, f"--job={command.REPORT}")
        needs = tuple(tasks[job.folder].name for job in study.graph.jobs)
        tasks[prefix + command.REPORT] = Task(prefix + command.REPORT, report, None, needs, processes=False)
    if len(config.sizes) > 1:
        needs = tuple(task.name for task in tasks.values() if task.folder is None)
        over_sizes = (*words, f"--job={command.REPORT}")
        tasks[command.REPORT] = Task(command.REPORT, over_sizes, None, needs, processes=False)
    return [*tasks.values()], _logs(workdir, "logs")
