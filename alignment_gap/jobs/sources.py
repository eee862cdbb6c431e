"""The sources of a training job: recorded examples, fresh samples, or both, in one function of step and state."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from alignment_gap.checkpoints.digest import params_digest
from alignment_gap.data.batches import PreferenceBatch, Prefetched
from alignment_gap.data.records.log_probs import ReferenceLogProbs
from alignment_gap.jobs.assembly import OPPONENTS, REFERENCE, SAMPLER, SAMPLES, Assembly
from alignment_gap.jobs.config import OnlineConfig, SourceConfig
from alignment_gap.jobs.reading import Reading, on_devices
from alignment_gap.jobs.served import reads_mismatched
from alignment_gap.judges import Judge
from alignment_gap.sampling import Begin, Draw, against_each_other, against_opponent, online_source
from alignment_gap.sharding import put_replicated
from alignment_gap.training import Source, Times, TrainState, with_fresh, with_mismatched, with_reference


class Parameters:
    """The parameters of another run's checkpoint, read when they are first needed.

    A job that continues may not need them.

    Attributes:
      read: returns the parameters on the mesh; raises UserError if they are damaged or of another model. Every process
        calls it.
    """

    def __init__(self, load: Callable[[], Any], said: str | None = None) -> None:
        """Takes a function that reads the parameters, and the digest that the checkpoint gives for them, if it does."""
        self.read, self._said = functools.cache(load), said

    def forget(self) -> None:
        """Frees their memory; the next `read` reads them again."""
        self.read.cache_clear()

    @functools.cached_property
    def digest(self) -> str:
        """The `params_digest` of the parameters."""
        return self._said or params_digest(self.read())


class Inputs(NamedTuple):
    """The inputs of a training job.

    Attributes:
      reading: the datasets of the source.
      fresh: the datasets of the second source, if there is one.
      judge: the judge of the online source, if it has one.
      start: parameters that training starts from, or the base of adapters; None for fresh parameters.
      reference: parameters of the reference policy; a moving reference begins with them. None if the job needs none.
      stored: the stored reference log-probs of every dataset, if they are used.
      validation: held-out examples, if there are any.
    """

    reading: Reading
    fresh: Reading | None
    judge: Judge | None
    start: Parameters | None
    reference: Parameters | None
    stored: Sequence[ReferenceLogProbs] = ()
    validation: Reading | None = None


def frozen_of(assembly: Assembly, inputs: Inputs) -> tuple[Any, ...]:
    """Further arguments of the update step after state and batch: the base of adapters, or none."""
    return (inputs.start.read(),) if assembly.adapters and inputs.start is not None else ()


@contextlib.contextmanager
def open_source(assembly: Assembly, inputs: Inputs, steps: int, times: Times) -> Iterator[Source]:
    """The source of a job's batches for `steps` steps; batches are read ahead until the context ends."""
    config = assembly.config
    with contextlib.ExitStack() as stack:
        source = _open(stack, assembly, inputs, config.source, inputs.reading, steps, times, inputs.stored)
        if config.fresh is not None and inputs.fresh is not None:
            source = with_fresh(source, _open(stack, assembly, inputs, config.fresh, inputs.fresh, steps, times))
        if assembly.is_policy and reads_mismatched(assembly.loss):
            source = with_mismatched(source, assembly.mesh)
        if assembly.needs_reference and not _is_all_stored(assembly, inputs):
            score = times.of_devices("reference", assembly.score)
            source = with_reference(source, score, reference_of(assembly, inputs))
        yield source


def _is_all_stored(assembly: Assembly, inputs: Inputs) -> bool:
    """Whether no batch needs the reference's parameters, because all its log-probs are stored."""
    return bool(inputs.stored) and inputs.fresh is None and not reads_mismatched(assembly.loss)


def _open(
    stack: contextlib.ExitStack,
    assembly: Assembly,
    inputs: Inputs,
    source: SourceConfig,
    reading: Reading,
    steps: int,
    times: Times,
    stored: Sequence[ReferenceLogProbs] = (),
) -> Source:
    config, mesh = assembly.config, assembly.mesh
    batches = reading.batches(mesh, config.seed, config.microbatches, stored)
    placed = on_devices(batches, reading.config, mesh, assembly.policy.config.vocabulary_size)
    ahead = times.of_host("data", stack.enter_context(Prefetched(placed, reading.config.prefetch, last=steps)))
    if not isinstance(source, OnlineConfig):
        return lambda step, state: ahead(step)
    shape = assembly.facts.fresh if source is config.fresh and assembly.facts.fresh else assembly.facts.batch
    drawing = _drawing(assembly, inputs, source, shape.response)
    draw = times.of_devices("sampling", drawing, source.steps_per_draw)
    scored = functools.partial(
        online_source, ahead, draw, keep=source.keep, mesh=mesh, steps_per_draw=source.steps_per_draw, last=steps
    )
    if inputs.judge is None:
        return scored(score=None)
    begin = inputs.judge.begin
    scores = inputs.judge.scores if begin is None else _timed(begin, times)
    score = against_each_other(scores)
    if source.against == "mixture":
        opponent = _drawing(assembly, inputs, source, shape.response, opponents=True)
        score = against_opponent(scores, opponent, mesh)
    if begin is None:
        return scored(score=times.of_devices("judging", score))

    # A mixture also samples with the reference, which may move.
    moving = (source.refresh_every, config.reference_every if source.mixture is not None else None)

    def keeps_sampler(step: int) -> bool:
        """Whether the next step samples with the same parameters; its samples can then be judged during this step."""
        return step + 1 < steps and not any(every and (step + 1) % every == 0 for every in moving)

    return scored(score=score, ahead=keeps_sampler)


def _timed(begin: Begin, times: Times) -> Begin:
    """Times how long every step waits for the scores of a judge that runs on other machines."""
    return lambda *texts: times.of_host("judging", begin(*texts))


def _drawing(
    assembly: Assembly, inputs: Inputs, online: OnlineConfig, response: int, *, opponents: bool = False
) -> Draw:
    """A function that draws the samples of an online source, or their opponents from the mixture."""
    generate = assembly.generate(online, response, opponents=opponents)
    key = put_replicated(assembly.key(OPPONENTS if opponents else SAMPLES), assembly.mesh)
    params_of = _sampler(assembly, inputs, online)
    mixed = (reference_of(assembly, inputs),) if online.mixture is not None else ()

    def draw(state: TrainState, batch: PreferenceBatch) -> Any:
        texts = (batch.prompt_ids, batch.prompts, batch.prompt_lengths)
        return generate(params_of(state), key, state.step, *texts, *(reference(state) for reference in mixed))

    return draw


def reference_of(assembly: Assembly, inputs: Inputs) -> Callable[[TrainState], Any]:
    """The reference's parameters as a function of the state: the copy in the state if it moves, otherwise fixed."""
    if REFERENCE in assembly.abstract.copies:
        return _copy_of(assembly, inputs, REFERENCE)
    assert inputs.reference is not None
    params = inputs.reference.read()
    return lambda state: params


def _copy_of(assembly: Assembly, inputs: Inputs, name: str) -> Callable[[TrainState], Any]:
    frozen = frozen_of(assembly, inputs)
    return lambda state: assembly.whole(state.copies[name], *frozen)


def _sampler(assembly: Assembly, inputs: Inputs, online: OnlineConfig) -> Callable[[TrainState], Any]:
    """The sampler's parameters as a function of the state: current, of the last refresh, or of the start."""
    if online.refresh_every == 1:
        frozen = frozen_of(assembly, inputs)
        return lambda state: assembly.whole(state.params, *frozen)
    if SAMPLER in assembly.abstract.copies:
        return _copy_of(assembly, inputs, SAMPLER)
    assert inputs.start is not None
    start = inputs.start.read()
    return lambda state: start
