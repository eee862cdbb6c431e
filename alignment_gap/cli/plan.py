"""Check whether a job fits TPUs or GPUs, and how fast its steps can be, without them.

alignment-gap plan --gin_file=gin/runs/online_ipo.gin --gin.PROMPTS=prepared/train --gin.START=runs/sft \\
    --gin.JUDGE=runs/proxy --topology=v5e:4x4 --layout=fsdp
alignment-gap plan --config=configs/study/tiny.py --job=seed0-golden --topology=v5e:2x4
alignment-gap plan --config=configs/study/tiny.py --topology=v5e:2x4 --kept=plans
alignment-gap plan --model=t5_xxl --topology=v5e:16x16 --layout=fsdp --batch=512 --json=plan.json
alignment-gap plan --model=t5_xl --online --judge=t5_large --topology=v5p:4x4x4 --batch=64
alignment-gap plan --model=t5_large --topology=v5e:2x4 --batch=32 --best=t5_large_v5e-8.gin
alignment-gap plan --model=t5_large --topology=h100:1 --layout=data --batch=16

The job comes from gin files or from a study; without either, it is IPO of --model. A study without --job is planned as
a whole: the device-hours of all its jobs at best. The job's folders need not exist: --model, --judge, --networks,
--prompt_length, --response_length and --examples describe what they will hold. Flags win over what the job and
its folders say. The plan lowers the functions of a run and compiles them with the compiler of the devices (pip
install 'jax[tpu]', or 'jax[cuda13-local]' for GPUs). The exit status is 1 if the job does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from alignment_gap.cli import gin_files, study
from alignment_gap.cli.flags import define_config, parse
from alignment_gap.cli.flags import read_config as flag_values
from alignment_gap.errors import UserError

if TYPE_CHECKING:
    from alignment_gap.jobs.folder import Job
    from alignment_gap.plan.known import Overrides
    from alignment_gap.plan.plan import Compile, Plan
    from alignment_gap.plan.steps import PlanConfig
    from alignment_gap.study.graph import StudyGraph

# The defaults of a plan without a job: lengths and batch of the paper (2405.08448), and the least memory.
USUAL: dict[str, Any] = {
    "batch": 512,
    "prompt_length": 1024,
    "response_length": 128,
    "remat": "full",
    "dtype": "bfloat16",
}


def main(arguments: list[str]) -> None:
    """Makes and shows the plan; raises UserError for invalid flags, and SystemExit(1) if a job does not fit."""
    # This process only counts; the processes that compile have their own devices. No TPU library starts in this one.
    os.environ["JAX_PLATFORMS"] = "cpu"
    parsed = _read_flags(arguments)
    if parsed is None:
        return
    values, settings = parsed.values, parsed.study

    from alignment_gap.folders import at, write_bytes
    from alignment_gap.plan.graph import plan_graph
    from alignment_gap.plan.kept import kept
    from alignment_gap.plan.plan import make_plan
    from alignment_gap.plan.report import as_json, as_text, graph_json, graph_text

    compile_ = kept(values.kept and at(values.kept), _say)
    if settings is not None and values.job is None:
        if values.best is not None:
            raise UserError("--best searches the settings of one job: name it by --job")
        planned = plan_graph(_study_jobs(settings), values.topology, _overrides(values), compile_)
        text, result = graph_text(planned), graph_json(planned)
        fits = all(each.plan.fits for each in planned if each.plan)
    else:
        config = _job_config(parsed)
        plan = make_plan(config, compile_) if values.best is None else _best_plan(parsed, config, compile_)
        text, result, fits = as_text(plan), as_json(plan), plan.fits
    print(text)
    if values.json is not None:
        path = at(values.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(result, indent=1).encode())
    if not fits:
        sys.exit(1)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _best_plan(asked: _Asked, config: PlanConfig, compile_: Compile) -> Plan:
    """Searches the best settings and writes them as a gin file; the plan of what is nearest if nothing fits."""
    from alignment_gap.folders import at, write_bytes
    from alignment_gap.plan.best import find_best
    from alignment_gap.plan.report import gin_text

    values = asked.values
    search = find_best(config, values.compiles, compile_, _say)
    found = "all that are tried" if search.is_complete else f"--compiles={values.compiles} ended the search"
    print(f"{len(search.trials)} settings tried, {search.compiled} programs compiled: {found}")
    if search.best is None:
        return min((trial.plan for trial in search.trials), key=lambda plan: plan.needed)
    path = at(values.best)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["alignment-gap", "plan", *asked.words])
    write_bytes(path, gin_text(search, command, values.model).encode())
    print(f"{search.best.choice}: {path}\n")
    return search.best.plan


def read_config(arguments: Sequence[str]) -> tuple[PlanConfig, flags.FlagValues] | None:
    """The settings of a plan of one job, and the flags; None after help was printed.

    Raises:
      UserError: the arguments are not valid; raised before anything is compiled.
    """
    parsed = _read_flags(arguments)
    return parsed and (_job_config(parsed), parsed.values)


class _Asked(NamedTuple):
    """The words of a command: its flags, what sets values of gin files, and the settings of a study.

    `study` is None without --config.
    """

    words: list[str]
    values: flags.FlagValues
    bindings: list[str]
    study: dict[str, Any] | None


def _read_flags(arguments: Sequence[str]) -> _Asked | None:
    """The flags of the command; None after help was printed."""
    rest, bindings = gin_files.split_overrides(arguments)
    from_study = any(word.startswith("--config") for word in rest)
    parsed: Any = study.read(rest, _define, __doc__) if from_study else parse(rest, _define_all, __doc__)
    if parsed is None:
        return None
    values, settings = parsed
    if values.topology is None:
        raise UserError("no --topology: give one, such as --topology=v5e:16x16")
    if from_study and (values.gin_file or bindings):
        raise UserError("give a job either by --config or by gin files, but not by both")
    return _Asked([*arguments[1:]], values, bindings, settings if from_study else None)


def _overrides(values: flags.FlagValues) -> Overrides:
    from alignment_gap.plan.known import Overrides

    return flag_values(values, Overrides, {})


def _job_config(asked: _Asked) -> PlanConfig:
    """The programs of one job, and where they run."""
    from alignment_gap.plan.known import Known, Overrides
    from alignment_gap.plan.steps import PlanConfig, programs_of
    from alignment_gap.sharding.chips import parse_topology

    values, given = asked.values, _overrides(asked.values)
    jobs: Sequence[Job] = ()
    if (asked.study is None) != (values.job is None):
        raise UserError("give a job of a study by --config and --job together")
    if asked.study is not None:
        job, jobs = _study_job(values.job, asked.study)
    elif values.gin_file or asked.bindings:
        job = gin_files.read_config(values.gin_file, asked.bindings, values.gin_search_paths)
    else:
        job = _usual_job(given, online=values.online)
        given = dataclasses.replace(Overrides(**USUAL), **{k: v for k, v in vars(given).items() if v is not None})
    given.check_folders([job, *(each.config for each in jobs)])
    training, programs = programs_of(job, Known(jobs, given))
    if not programs:
        raise UserError("this job computes on no device: there is nothing to plan")
    topology = parse_topology(values.topology, training.mesh.slices)
    return PlanConfig(training, programs, topology, values.search)


def _define_all(values: flags.FlagValues) -> None:
    flags.DEFINE_string("config", None, study.ABOUT, flag_values=values)
    _define(values)


def _define(values: flags.FlagValues) -> None:
    from alignment_gap.plan.known import Overrides

    gin_files.define_gin(values)
    define_config(values, Overrides, {})
    for name, says in (
        ("job", "Name of a job in the study of --config; without it, the whole study is planned."),
        ("topology", "Devices: v4:4x4x4, v5e:16x16, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, h100:8, h200:8 or cpu:8."),
        ("json", "JSON file for all results."),
        ("kept", "Folder for the compiler's figures, from which a stopped plan continues."),
        ("best", "Gin file for the settings with the least step time: layout, mesh, remat, microbatches, moments."),
    ):
        flags.DEFINE_string(name, None, says, flag_values=values)
    flags.DEFINE_boolean("online", False, "Without a job: plan sampling, reference and judge too.", flag_values=values)
    flags.DEFINE_boolean("search", True, "Look for the largest batch that fits.", flag_values=values)
    flags.DEFINE_integer("compiles", 80, "With --best: the number of programs to compile at most.", flag_values=values)


def _usual_job(given: Overrides, *, online: bool) -> Any:
    """IPO of a policy of this size, on samples or on pairs with stored reference log-probs."""
    from alignment_gap.jobs.config import DatasetConfig, JobConfig, OnlineConfig
    from alignment_gap.judges import JudgeConfig
    from alignment_gap.sharding import MeshConfig

    if given.model is None:
        raise UserError(
            "no --model: give one, such as --model=t5_xxl, or a job by --gin_file, or by --config and --job"
        )
    if given.judge is not None and not online:
        raise UserError(f"--judge={given.judge}: only an online step has a judge; add --online, or leave it out")
    judge = JudgeConfig(None if given.judge is None else "judge")
    source = OnlineConfig(judge=judge) if online else DatasetConfig()
    mesh = MeshConfig(layout="fsdp")
    # Nobody said how many steps this job has, so the plan tells no time of a whole job.
    return JobConfig(source=source, mesh=mesh, steps=None, start="start", reference_log_probs="stored")


def _study_job(name: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """A job of a study, and all jobs of its graph."""
    graphs = _study_graphs(settings)
    if len(graphs) > 1:
        raise UserError(f'--job={name}: name one of the sizes, such as --config.sizes="({next(iter(graphs))!r},)"')
    (graph,) = graphs.values()
    return graph.job(name).config, graph.jobs


def _study_jobs(settings: dict[str, Any]) -> list[Job]:
    """All jobs of a study, each once; the name of a job that not all sizes share has its size."""
    graphs = _study_graphs(settings)
    places = [{job.folder for job in graph.jobs} for graph in graphs.values()]
    shared, found = set.intersection(*places), dict[Any, Any]()
    for size, graph in graphs.items():
        for job in graph.jobs:
            name = job.name if job.folder in shared else f"{size} {job.name}"
            found.setdefault(job.folder, dataclasses.replace(job, name=name))
    return [*found.values()]


def _study_graphs(settings: dict[str, Any]) -> dict[str, StudyGraph]:
    """The graph of each size of a study, by its name; "" for a study without sizes."""
    from alignment_gap.configuration import from_dict
    from alignment_gap.study.config import StudyConfig
    from alignment_gap.study.graph import study_graph
    from alignment_gap.study.run import of_size

    config = from_dict(StudyConfig, settings)
    studies = {size: of_size(config, size) for size in config.sizes} or {"": config}
    return {size: study_graph(study, Path("jobs")) for size, study in studies.items()}
