"""Runs a study in this process: all unfinished jobs of its graph, then the report."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from alignment_gap.checkpoints import find_checkpoint
from alignment_gap.configuration import defaults, flatten, from_dict, to_dict
from alignment_gap.data.records import card, open_dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.data.records.dataset import CARD
from alignment_gap.data.tasks.prepare import TRAIN, VALIDATION, vocabulary_place
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.data.text import Vocabulary, load_vocabulary, open_source
from alignment_gap.data.text.vocabulary import POSTS
from alignment_gap.errors import UserError
from alignment_gap.folders import STUDY, AnyPath, at, check_kind, check_settings, locked, write_json
from alignment_gap.jobs.assembly import markers_of
from alignment_gap.jobs.config import POLICY, JobConfig
from alignment_gap.jobs.evaluate import named
from alignment_gap.jobs.folder import Job, make
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.record import RECORD
from alignment_gap.jobs.served import REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS, check_runs, check_served
from alignment_gap.judges import check_judge
from alignment_gap.judges.rubric import RUBRIC
from alignment_gap.models import count_parameters, make_policy, sizes
from alignment_gap.progress import Bar, progress_bar
from alignment_gap.sharding import check_batch_size, first_says, is_first_process, on_every_process, on_first_process
from alignment_gap.study.analysis import ORIGIN, CheckpointResult
from alignment_gap.study.config import StudyConfig, settings_by_size
from alignment_gap.study.graph import JOBS, StudyGraph, study_graph
from alignment_gap.study.report import peaks_text, write_report
from alignment_gap.study.results import report_context, study_results, wall_time


@dataclasses.dataclass(frozen=True)
class Study:
    """A study whose settings and inputs are checked.

    Attributes:
      config: settings of the study.
      workdir: its folder, which gets the report.
      graph: graph of its jobs; other studies may share the jobs' folders.
    """

    config: StudyConfig
    workdir: AnyPath
    graph: StudyGraph


def say_once(line: str) -> None:
    """Prints a line in the first process only."""
    if is_first_process():
        print(line, flush=True)


Say = Callable[[str], None]


def open_studies(config: StudyConfig, workdir: AnyPath) -> list[Study]:
    """The study of a config in `workdir`; with `sizes`, one study for each size in `workdir`/SIZE.

    Jobs are in `workdir`/jobs. Studies of different sizes share the jobs that do not depend on the policy: the data,
    the judges that do not start from the policy, and their labels.

    Raises:
      UserError: a setting cannot be run here; it names the first one.
    """
    studies = {name: of_size(config, name) for name in config.sizes} or {"": config}
    return [Study(study, workdir / name, checked_graph(study, workdir / JOBS)) for name, study in studies.items()]


def of_size(config: StudyConfig, name: str) -> StudyConfig:
    """The study of one size: the study over sizes with this size's shape and settings."""
    if config.policy is None:
        raise UserError("policy is not set: set it, because a study over sizes takes vocabulary and dtype from it")
    kept = ("vocabulary_size", "dtype", "remat", "scan_unroll")
    policy = sizes.get(name, **{field: getattr(config.policy, field) for field in kept})
    start = config.sft.start and config.sft.start.replace("{size}", name)
    base, arms = config.base, config.arms
    if base is not None:
        base = dataclasses.replace(
            base,
            sft=base.sft or dataclasses.replace(config.sft, start=None),
            batch_size=base.batch_size or arms.batch_size,
            learning_rate=base.learning_rate or arms.optimizer.learning_rate,
        )
    sft = dataclasses.replace(config.sft, start=start)
    alone: dict[str, Any] = {"name": f"{config.name} {name}", "sizes": (), "by_size": ()}
    values = to_dict(dataclasses.replace(config, policy=policy, base=base, sft=sft, **alone))
    for setting, of_sizes in settings_by_size(config).items():
        *groups, last = setting.split(".")
        functools.reduce(operator.getitem, groups, values)[last] = of_sizes[config.sizes.index(name)]
    return from_dict(StudyConfig, values)


def default_at_once() -> int:
    """How many jobs run at once: 2 for one process on a CPU, because one job seldom uses all cores; otherwise 1."""
    fits = jax.default_backend() == "cpu" and jax.process_count() == 1
    return min(2, os.cpu_count() or 1) if fits else 1


def run_study(study: Study, *, update: bool = False, at_once: int | None = None, say: Say = say_once) -> AnyPath:
    """Runs all unfinished jobs, and writes report.html, results.csv and figures/ to the study's folder.

    Args:
      study: a study from `open_studies`.
      update: allows a folder with the study of another config; results that do not depend on the change are kept.
      at_once: number of jobs that run at the same time, in threads that share compiled programs; None for
        `default_at_once`. It does not change the results.
      say: prints a line.

    Returns:
      The report's path.

    Raises:
      UserError: a setting or an input cannot be used; the folder belongs to another study or is in use; or `at_once` is
        above 1 with several processes, which must run the jobs in the same order.
    """
    at_once = default_at_once() if at_once is None else at_once
    if at_once > 1 and jax.process_count() > 1:
        raise UserError(f"at_once is {at_once}, but {jax.process_count()} processes share each job: set it to 1")
    with owned(study, update=update):
        run_jobs(study.graph.jobs, at_once, say)
        on_first_process(lambda: write_study_report(study, say))
    return study.workdir / "report.html"


def run_jobs(jobs: Sequence[Job], at_once: int, say: Say) -> None:
    """Runs unfinished jobs, `at_once` at the same time; each starts after the jobs that it needs.

    After a failure no further job starts; the error is raised when the running jobs have ended.
    """
    titles = {job.name: f"[{number}/{len(jobs)}] {job.name}" for number, job in enumerate(jobs, 1)}
    if at_once == 1:
        for job in jobs:
            run_job(job, titles[job.name], say)
        return
    left, running = list(jobs), dict[Future[None], Job]()
    with ThreadPoolExecutor(at_once) as pool:
        while left or running:
            unfinished = {job.name for job in (*left, *running.values())}
            ready = [job for job in left if unfinished.isdisjoint(need.name for need in job.needs)]
            for job in ready[: at_once - len(running)]:
                left.remove(job)
                running[pool.submit(run_job, job, titles[job.name], say)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                future.result()


def run_job(job: Job, title: str, say: Say = say_once) -> None:
    """Runs one job of a graph, unless it is done; shows a progress bar with its title."""
    if first_says(lambda: job.is_done and job.kind.is_whole(job.folder)):
        say(f"{title}: finished before")
        return

    def open_bar(total: int | None, name: str, unit: str) -> Bar:
        return progress_bar(total, title, unit, silent=not is_first_process())

    make(job.kind, job.config, job.folder, open_bar)


def check_done(study: Study) -> None:
    """Raises UserError if a job of the study is not done."""
    missing = [job.name for job in study.graph.jobs if not job.is_done]
    if missing:
        raise UserError(f"{len(missing)} jobs are not done, such as {missing[0]}: run the study, or these jobs")


def write_study_report(study: Study, say: Say = say_once) -> None:
    """Writes the report of a study whose jobs are done; raises UserError if one is not."""
    check_done(study)
    results = study_results(study.graph)
    study.workdir.mkdir(parents=True, exist_ok=True)
    report = write_report(study.workdir, results, report_context(study.config, study.graph))
    say(peaks_text(results))
    say(f"report: {report}")


def write_sizes_report(config: StudyConfig, studies: Sequence[Study], workdir: AnyPath, say: Say = say_once) -> None:
    """Writes the report over several sizes; raises UserError if a job is not done.

    The first size is the main one, and most claims are about it. The claims and figures on scale use all sizes.
    """
    for study in studies:
        check_done(study)
    results = [result for study, name in zip(studies, config.sizes, strict=True) for result in _of_size(study, name)]
    own = [dataclasses.replace(r, size="") if r.size == config.sizes[0] else r for r in results]
    with locked(workdir):
        context = report_context(studies[0].config, studies[0].graph)
        times = _times_of_sizes(studies, config.sizes)
        report = write_report(workdir, own, dataclasses.replace(context, config=config, wall_time=times))
    say(f"report over {len(studies)} sizes: {report}")


def _times_of_sizes(studies: Sequence[Study], names: Sequence[str]) -> dict[str, datetime.timedelta]:
    """The duration of every job of all sizes; a job that not all of them share has a size's name before its own."""
    jobs: dict[AnyPath, list[tuple[str, Job]]] = {}
    for study, size in zip(studies, names, strict=True):
        for job in study.graph.jobs:
            jobs.setdefault(job.folder, []).append((size, job))
    return {
        job.name if len(others) == len(studies) - 1 else f"{size}-{job.name}": wall_time(job)
        for (size, job), *others in jobs.values()
    }


def _of_size(study: Study, name: str) -> list[CheckpointResult]:
    """The results of a study, marked with the name of its size."""
    parameters = count_parameters(make_policy(study.config.policy)) if study.config.policy else 0
    return [dataclasses.replace(r, size=name, parameters=parameters) for r in study_results(study.graph)]


def list_text(graph: StudyGraph, report: str) -> str:
    """Lists every job with its state, folder, inputs and command; the report comes last."""
    blocks = []
    for job in graph.jobs:
        needs = ", ".join(each.name for each in job.needs) or "nothing"
        blocks.append(f"{job.name}: {job.state}\n  folder  {job.folder}\n  needs   {needs}\n  {job.command}")
    return "\n".join([*blocks, f"report\n  needs   all jobs\n  {report}"])


def checked_graph(config: StudyConfig, root: AnyPath) -> StudyGraph:
    """The graph of a study; raises UserError, before any work, for the first setting that cannot be run here."""
    if "," in str(root):
        raise UserError(f"the folder {root.parent} has a comma, but commas separate folders in settings: give another")
    graph = study_graph(config, root)
    devices = jax.device_count()
    data, fsdp, _ = config.mesh.shape(devices)
    for name in ("sft", "golden", "proxy", "arms", "evaluation"):
        microbatches = 1 if name == "evaluation" else config.microbatches
        check_batch_size(f"{name}.batch_size", getattr(config, name).batch_size, data * fsdp, microbatches)
    for job in graph.jobs:
        if isinstance(job.config, JobConfig) and job.config.kind == POLICY:
            _check_loss(job.name, job.config)
    on_every_process(lambda: _check_inputs(config, graph))
    return graph


def _check_loss(name: str, config: JobConfig) -> None:
    """Raises UserError if a loss does not run, or an arm's source lacks what it reads; a record has all its arrays."""
    is_stream = at(str(config.recorded.folder)).name == RECORD
    try:
        check_runs(config, config.loss.function())
        check_served(config, config.loss.function(), (REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS) if is_stream else ())
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _check_inputs(config: StudyConfig, graph: StudyGraph) -> None:
    """Raises UserError if an input of a late job is missing, or a network is invalid or has too few ids."""
    for start in (config.sft.start, config.golden.start, config.proxy.start, config.arms.start):
        if start not in (None, ORIGIN):
            find_checkpoint(at(start))
    for _, judge in map(named, config.evaluation.judges):
        check_judge(judge)
    for dataset in config.sft.also:
        open_dataset(dataset)
    vocabulary, place, has_rubric = _task(config, graph)
    if RUBRIC in [judge for _, judge in map(named, config.evaluation.judges)] and not has_rubric:
        raise UserError(
            f"evaluation.judges has {RUBRIC!r}, but these pairs do not come from the built-in task, which alone has "
            "one: leave it out"
        )
    for name, kind in (("golden", config.golden.kind), ("proxy", config.proxy.kind)):
        try:
            markers_of(kind, vocabulary, place)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    networks = {
        "policy": config.policy,
        "base": config.base.model if config.base else None,
        "golden": config.golden.model,
        "proxy": config.proxy.model,
    }
    for name, model in networks.items():
        if model is None:
            continue
        make_policy(model)
        if model.vocabulary_size < vocabulary.size:
            raise UserError(
                f"{name} has vocabulary_size={model.vocabulary_size}, but the task's vocabulary has {vocabulary.size} "
                "ids: raise it to at least that"
            )


def _task(config: StudyConfig, graph: StudyGraph) -> tuple[Vocabulary, str | None, bool]:
    """The vocabulary of the pairs, its path, and whether a rubric rates them; raises UserError if one is missing."""
    preparing = [job for job in graph.jobs if job.kind is PREPARE]
    if any(not job.is_done for job in preparing):
        open_source(config.task.source, config.task.vocabulary)
        place = vocabulary_place(config.task)
        return load_vocabulary(place), place, config.task.source.location == POSTS
    folder = preparing[0].folder if preparing else at(str(config.prepared))
    if (folder / CARD).exists():
        raise UserError(
            f"prepared is {folder}, which is one dataset: give the folder that has {TRAIN} and {VALIDATION}, such as "
            f"{folder.parent}"
        )
    training, _ = (open_dataset(folder / split) for split in (TRAIN, VALIDATION))
    return find_vocabulary(training), card.vocabulary_place(training), rubric_of(training) is not None


@contextlib.contextmanager
def owned(study: Study, *, update: bool) -> Iterator[None]:
    """Holds a study's folder in the first process; raises UserError if it belongs to another config or is in use."""
    with contextlib.ExitStack() as stack:
        on_first_process(lambda: stack.enter_context(_claimed(study, update=update)))
        yield


@contextlib.contextmanager
def _claimed(study: Study, *, update: bool) -> Iterator[None]:
    with locked(study.workdir):
        check_config(study, update=update)
        write_json(study.workdir / STUDY, flatten(to_dict(study.config)))
        yield


def check_config(study: Study, *, update: bool) -> None:
    """Raises UserError if a study's folder belongs to the study of another config, unless `update` allows that."""
    path, settings = study.workdir / STUDY, flatten(to_dict(study.config))
    if update:
        check_kind(path)
        return
    remedy = "give another --workdir, or --update to replace its report and redo only the jobs that depend on what"
    check_settings(path, settings, remedy=f"{remedy} changed", defaults=flatten(defaults(study.config)))
