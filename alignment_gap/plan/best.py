"""The settings of a job that take the least time a step and fit: layout, mesh, remat, microbatches, moments, draws.

The search compiles the update of every mesh first, with all activations recomputed, which needs the least memory. On
the two fastest meshes it then keeps more activations, in as few microbatches as fit. The other programs of a step, such
as the sampler, depend on the mesh alone: they are compiled for the fastest of these updates, until one fits with all of
them. If the sampler keeps its parameters for several steps, it then draws for more steps at once, while that helps. No
program is compiled twice, and never more programs than were asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from alignment_gap.errors import UserError
from alignment_gap.jobs.config import JobConfig, OnlineConfig
from alignment_gap.plan.plan import Compile, Plan, make_plan
from alignment_gap.plan.programs import Compiled, compile_program
from alignment_gap.plan.roofline import milliseconds
from alignment_gap.plan.steps import PlanConfig, Program
from alignment_gap.sharding import AXES
from alignment_gap.sharding.chips import GIB
from alignment_gap.training.optimizers import WITH_MOMENT

# What the backward pass recomputes, the most first.
_REMAT = ("full", "dots", "none")
# Sizes of the model axis that are tried, beside all devices.
_MODEL_AXES = (2, 4, 8, 16)
# Meshes whose updates are tried with less recomputed.
_MESHES = 2
_MOST_MICROBATCHES = 16
_STEPS_PER_DRAW = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings that change how fast a job is, and not what it computes; but for the moments' dtype.

    Attributes:
      layout: the layout of the mesh.
      sizes: sizes of its axes data, fsdp and model.
      remat: what the backward pass recomputes.
      microbatches: parts of a batch, one after another.
      moment_dtype: dtype of the optimizer's first moments.
      steps_per_draw: steps whose samples are drawn in one call.
    """

    layout: str
    sizes: tuple[int, int, int]
    remat: str
    microbatches: int
    moment_dtype: str
    steps_per_draw: int

    def __str__(self) -> str:
        """The settings as a line."""
        sizes = " ".join(f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True))
        draws = f", {self.steps_per_draw} steps a draw" if self.steps_per_draw > 1 else ""
        return (
            f"{self.layout} {sizes}, remat {self.remat}, {self.microbatches} microbatches, moments {self.moment_dtype}"
            f"{draws}"
        )

    def splits(self, batch: int) -> bool:
        """Whether the mesh and the microbatches split a batch into equal parts."""
        data, fsdp, _ = self.sizes
        return batch % (data * fsdp * self.microbatches) == 0

    def applied(self, config: PlanConfig) -> PlanConfig:
        """The plan of the job with these settings."""
        job = config.job
        data, fsdp, model = self.sizes
        mesh = dataclasses.replace(job.mesh, layout=self.layout, data=data, fsdp=fsdp, model=model)
        optimizer = dataclasses.replace(job.optimizer, moment_dtype=self.moment_dtype)
        job = dataclasses.replace(job, mesh=mesh, optimizer=optimizer, microbatches=self.microbatches)
        job = _with_draws(job, self.steps_per_draw)
        first, *others = (each.with_draws(self.steps_per_draw) for each in config.programs)
        return dataclasses.replace(
            config, job=job, programs=(first.with_model(remat=self.remat), *others), search=False
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that were tried, and the plan with them: of the update alone, or of the whole step."""

    choice: Choice
    plan: Plan


@dataclasses.dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
      best: the fastest trial that fits with all programs of a step; None if none does.
      trials: all that was tried, in this order.
      compiled: number of programs that were compiled.
      is_complete: whether the number of programs was enough for the whole search.
    """

    best: Trial | None
    trials: tuple[Trial, ...]
    compiled: int
    is_complete: bool


class _Spent(Exception):
    """All compiles that were asked for are done."""


def find_best(
    config: PlanConfig,
    compiles: int,
    compile_: Compile = compile_program,
    say: Callable[[str], None] = print,
) -> Search:
    """Searches the settings of a training job for the least time of a step that fits.

    Args:
      config: the job, with the batch that a step has over all devices, and the devices.
      compiles: number of programs to compile at most.
      compile_: compiles one program.
      say: gets a line about each trial.

    Raises:
      UserError: the job does not train, no mesh can split its batch, or the compiler is not available.
    """
    if config.programs[0].kind != "update":
        raise UserError("best is set, but this job trains nothing: there is no update to choose settings for")
    if compiles < 1:
        raise UserError(f"compiles is {compiles}: it must be at least 1")
    choices = [*_meshes(config)]
    if not choices:
        raise UserError(
            f"batch is {config.programs[0].batch.batch}: no mesh of {config.topology.devices} devices can split it: "
            "give a multiple of the number of devices, or fewer devices"
        )
    known, done = dict[str, Compiled](), dict[tuple[Choice, int], Trial]()

    def compile_once(config: PlanConfig, program: Program) -> Compiled:
        # How many steps a sampler draws for does not change an update.
        key = repr((_with_draws(config.job, 1) if program.kind == "update" else config.job.mesh, program))
        if key not in known:
            if len(known) == compiles:
                raise _Spent
            known[key] = compile_(config, program)
        return known[key]

    def tried(choice: Choice, *, whole: bool = False) -> Trial:
        planned = choice.applied(config)
        programs = planned.programs if whole else planned.programs[:1]
        if (choice, len(programs)) in done:
            return done[choice, len(programs)]
        quiet = make_plan(dataclasses.replace(planned, programs=programs), compile_once)
        trial = done[choice, len(programs)] = Trial(choice, quiet)
        say(_line(trial))
        return trial

    best, is_complete = None, True
    try:
        best = _search(config, choices, tried)
    except _Spent:
        is_complete = False
        whole = [trial for (_, programs), trial in done.items() if programs == len(config.programs)]
        best = next(iter(_fitting(whole)), None)
    return Search(best, tuple(done.values()), len(known), is_complete)


def _search(config: PlanConfig, choices: list[Choice], tried: Callable[..., Trial]) -> Trial | None:
    batch, moments = config.programs[0].batch.batch, config.job.optimizer.name in WITH_MOMENT
    updates = [tried(choice) for choice in choices]
    if moments and not any(trial.plan.fits for trial in updates):
        nearest = sorted(updates, key=lambda trial: trial.plan.needed)[:_MESHES]
        updates += [tried(dataclasses.replace(trial.choice, moment_dtype="bfloat16")) for trial in nearest]
    for trial in _fitting(updates)[:_MESHES]:
        updates += _keeping_more(trial.choice, batch, tried)
    best: Trial | None = None
    for trial in _fitting(updates):
        if best is not None and _seconds(trial) >= _seconds(best):
            break  # Its update alone takes longer than the best whole step.
        whole = tried(trial.choice, whole=True)
        if whole.plan.fits and (best is None or _seconds(whole) < _seconds(best)):
            best = whole
    return best and _drawing_more(config.job.online, best, tried)


def _drawing_more(online: OnlineConfig | None, best: Trial, tried: Callable[..., Trial]) -> Trial:
    """The best trial whose sampler draws for more steps at once, as long as each is faster than the one before."""
    if online is None or online.refresh_every == 1 or online.prompts.buckets > 1:
        return best
    for steps in _STEPS_PER_DRAW:
        if online.refresh_every % steps == 0 and steps > online.steps_per_draw:
            more = tried(dataclasses.replace(best.choice, steps_per_draw=steps), whole=True)
            if not more.plan.fits or _seconds(more) >= _seconds(best):
                break
            best = more
    return best


def _fitting(trials: list[Trial]) -> list[Trial]:
    """The trials that fit, the fastest first."""
    return sorted((trial for trial in trials if trial.plan.fits), key=_seconds)


def _keeping_more(choice: Choice, batch: int, tried: Callable[..., Trial]) -> Iterator[Trial]:
    """Trials that recompute less, each in the fewest microbatches that fit."""
    for remat in _REMAT[1:]:
        less = dataclasses.replace(choice, remat=remat)
        while less.splits(batch) and less.microbatches <= _MOST_MICROBATCHES:
            trial = tried(less)
            yield trial
            if trial.plan.fits:
                break
            less = dataclasses.replace(less, microbatches=2 * less.microbatches)


def _meshes(config: PlanConfig) -> Iterator[Choice]:
    """Every mesh that can split the batch, with all activations recomputed."""
    job, devices, slices = config.job, config.topology.devices, config.topology.slices
    batch, inside = config.programs[0].batch.batch, devices // slices
    models = sorted({size for size in (*_MODEL_AXES, inside) if 1 < size <= inside and inside % size == 0})
    shapes: list[tuple[str, tuple[int, int, int]]] = [("data", (devices, 1, 1))]
    shapes += [("fsdp", (slices, inside, 1))] if inside > 1 else []
    for size in models:
        if config.programs[0].model.heads % size == 0:
            split = (slices, inside // size, size)
            shapes += [("tensor", split)] if size == inside else [("fsdp_tensor", split), ("sequence", split)]
    for layout, sizes in shapes:
        draws = job.online.steps_per_draw if job.online else 1
        choice = Choice(layout, sizes, _REMAT[0], job.microbatches, job.optimizer.moment_dtype, draws)
        if choice.splits(batch):
            yield choice


def _with_draws(job: JobConfig, steps: int) -> JobConfig:
    """The job with a sampler that draws for so many steps at once, if it has one."""
    if job.online is None:
        return job
    online = dataclasses.replace(job.online, steps_per_draw=steps)
    if job.online is job.fresh:
        return dataclasses.replace(job, fresh=online)
    return dataclasses.replace(job, source=online)


def _line(trial: Trial) -> str:
    plan = trial.plan
    update = plan.parts[0]
    time = f"{milliseconds(plan.step_seconds)} ms, bound by {update.times.bound}" if update.times else "not compiled"
    what = "a step" if len(plan.parts) > 1 else "the update"
    need = f"{plan.needed / GIB:.2f} of {plan.capacity / GIB:.2f} GiB"
    return f"  {trial.choice}: {what} {time}; {need}{'' if plan.fits else ', does not fit'}"


def _seconds(trial: Trial) -> float:
    return trial.plan.step_seconds
