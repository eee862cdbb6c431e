"""The online source: fresh samples of a policy, scored, as batches for the same update step as offline batches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.models import Policy
from alignment_gap.sampling.sampler import Mixture, SamplerConfig, Samples, sample, sample_keys
from alignment_gap.sharding import LogicalMesh, batch_sharding, within

# Scores [B, K] of responses: (prompts, prompt_lengths, responses, response_lengths) -> scores, on the devices.
Scores = Callable[[Array, Array, Array, Array], Float[Array, "B K"]]
# (state, prompts) -> samples. The step of the state may be an array, with a step for each prompt.
Draw = Callable[[Any, PreferenceBatch], Samples]
# For a judge on other machines: begins to ask for the scores of responses, and returns a function that waits for them.
Begin = Callable[..., Callable[[], Float[Array, "B K"]]]
# (state, the prompts of a step, the samples) -> scores [B, K], or a function that waits for them.
Score = Callable[[Any, PreferenceBatch, Samples], Float[Array, "B K"] | Callable[[], Float[Array, "B K"]]]

# Which of a prompt's K samples a batch keeps: all, the two with the highest and the lowest score, or only the best.
KEEP = ("all", "best_and_worst", "best")


@functools.cache
def make_generate(
    policy: Policy,
    mesh: LogicalMesh,
    *,
    samples: int,
    max_length: int,
    eos_id: int | tuple[int, ...],
    config: SamplerConfig,
    mixture: float | None = None,
) -> Callable[..., Samples]:
    """A jitted `(params, run_key, steps, prompt_ids, prompts, prompt_lengths) -> Samples`, sharded over the batch.

    The steps are those of `sample_keys`. With a mixture, its last argument is the reference's parameters, and it draws
    from the mixture of both policies; see `Mixture`.
    """

    def generate(
        params: Any,
        run_key: Key[Array, ""],
        steps: Int[Array, "*B"],
        ids: Int[Array, "B"],
        prompts: Int[Array, "B P"],
        lengths: Int[Array, "B"],
        reference: Any = None,
    ) -> Samples:
        return sample(
            policy,
            params,
            prompts,
            lengths,
            sample_keys(run_key, steps, ids, samples),
            max_length=max_length,
            eos_id=eos_id,
            config=config,
            mixture=None if mixture is None else Mixture(reference, mixture),
        )

    return jax.jit(within(mesh, generate), out_shardings=batch_sharding(mesh))


def online_source(
    prompts: Callable[[int], PreferenceBatch],
    draw: Draw,
    score: Score | None,
    keep: str,
    mesh: LogicalMesh,
    ahead: Callable[[int], bool] = lambda step: False,
    *,
    steps_per_draw: int = 1,
    last: int | None = None,
) -> Callable[[int, Any], PreferenceBatch]:
    """A source whose batches are fresh samples, for the same update step as offline batches.

    Args:
      prompts: gives the prompts of a step, in the form of a batch; its responses and scores are ignored.
      draw: draws K samples for each prompt.
      score: scores the samples; None scores all of them 0.5. It may return a function that waits for the scores. Then
        a prompt whose scores are nan is left out: another prompt of the batch takes its place, with its samples and
        scores.
      keep: one of `KEEP`.
      mesh: the device mesh.
      ahead: whether, at this step, the source draws the next step's samples before it waits for this step's scores.
        Only valid if `draw` would give the same samples after this step's update.
      steps_per_draw: number of steps whose samples are drawn in one call, from a multiple of it on. Only valid if
        `draw` would give the same samples before each of these steps, and if their prompts have the same shape.
      last: the first step that has no prompts, if there is one; a call that reaches it repeats the last prompts.

    Returns:
      `(step, state) -> batch`. The batch holds the tokens' log-probs under the distribution that they were drawn from.
    """
    select, fill = _make_select(keep, mesh), _make_fill(mesh)
    begun: dict[int, tuple[PreferenceBatch, Samples, Any]] = {}
    drawn_at = _drawer(prompts, draw, steps_per_draw, last, mesh)

    def begin(step: int, state: Any) -> tuple[PreferenceBatch, Samples, Any]:
        batch, drawn = drawn_at(step, state)
        return batch, drawn, None if score is None else score(state, batch, drawn)

    def source(step: int, state: Any) -> PreferenceBatch:
        batch, drawn, scores = begun.pop(step) if step in begun else begin(step, state)
        if ahead(step):
            begun[step + 1] = begin(step + 1, dataclasses.replace(state, step=_following(state.step)))
        texts = (batch.prompt_ids, batch.prompts, batch.prompt_lengths)
        if callable(scores):
            scores = scores()
            texts, drawn, scores = fill((texts, drawn, scores), scores)
        responses, lengths, scores, log_probs = select(drawn, scores)
        return PreferenceBatch(*texts, responses, lengths, scores, sampler_log_probs=log_probs)

    return source


def _drawer(
    prompts: Callable[[int], PreferenceBatch], draw: Draw, steps: int, last: int | None, mesh: LogicalMesh
) -> Callable[[int, Any], tuple[PreferenceBatch, Samples]]:
    """A function that gives the prompts and the samples of a step, and draws for `steps` steps at once."""
    if steps == 1:

        def single(step: int, state: Any) -> tuple[PreferenceBatch, Samples]:
            batch = prompts(step)
            return batch, draw(state, batch)

        return single
    join, split = _make_join(steps, mesh), _make_split(steps, mesh)
    waiting: dict[int, tuple[PreferenceBatch, Samples]] = {}

    def several(step: int, state: Any) -> tuple[PreferenceBatch, Samples]:
        if step not in waiting:
            first = step - step % steps
            window = range(first, first + steps)
            batches = [prompts(each if last is None else min(each, last - 1)) for each in window]
            numbers, joined = join(state.step, batches, step - first)
            found = split(draw(dataclasses.replace(state, step=numbers), joined))
            waiting.clear()
            waiting.update(zip(window, zip(batches, found, strict=True), strict=True))
        return waiting.pop(step)

    return several


def against_each_other(scores: Scores | Begin) -> Score:
    """Scores the samples of a prompt against each other."""

    def score(state: Any, batch: PreferenceBatch, drawn: Samples) -> Any:
        return scores(batch.prompts, batch.prompt_lengths, drawn.responses, drawn.lengths)

    return score


def against_opponent(scores: Scores | Begin, opponent: Draw, mesh: LogicalMesh) -> Score:
    """Scores every sample by its preference over one sample of an opponent, as Nash-MD does (2312.00886)."""
    pair = _make_pair(mesh)

    def score(state: Any, batch: PreferenceBatch, drawn: Samples) -> Any:
        other = opponent(state, batch)
        pairs = (pair(drawn, other, index) for index in range(drawn.lengths.shape[1]))
        asked: tuple[Any, ...] = tuple(scores(batch.prompts, batch.prompt_lengths, *each) for each in pairs)
        if callable(asked[0]):
            return lambda: _first_of_each(tuple(wait() for wait in asked))
        return _first_of_each(asked)

    return score


@functools.cache
def _make_pair(mesh: LogicalMesh) -> Callable[[Samples, Samples, int], tuple[Array, Array]]:
    """A jitted function that pairs sample `index` with the opponent's: responses [B, 2, R] and lengths [B, 2]."""

    def pair(drawn: Samples, other: Samples, index: int) -> tuple[Array, Array]:
        sides = (drawn.responses[:, index], other.responses[:, 0]), (drawn.lengths[:, index], other.lengths[:, 0])
        return jnp.stack(sides[0], axis=1), jnp.stack(sides[1], axis=1)

    return jax.jit(within(mesh, pair), static_argnums=2, out_shardings=batch_sharding(mesh))


@jax.jit
def _first_of_each(scores: tuple[Float[Array, "B 2"], ...]) -> Float[Array, "B K"]:
    return jnp.stack([each[:, 0] for each in scores], axis=1)


@jax.jit
def _following(step: Int[Array, ""]) -> Int[Array, ""]:
    return step + 1


@functools.cache
def _make_join(steps: int, mesh: LogicalMesh) -> Callable[..., tuple[Int[Array, "N"], PreferenceBatch]]:
    """A jitted `(step, batches, place) -> (steps, batch)`: batches of successive steps, and the step of each row.

    `step` is the step of the batch at `place`. A prompt's row comes before the same row of the next step, so that rows
    stay on their devices.
    """

    def join(step: Int[Array, ""], batches: list[PreferenceBatch], place: int) -> tuple[Array, PreferenceBatch]:
        joined = jax.tree.map(lambda *rows: _merged(jnp.stack(rows, axis=1)), *batches)
        return jnp.tile(step - place + jnp.arange(steps), len(batches[0].prompt_ids)), joined

    return jax.jit(within(mesh, join), static_argnums=2, out_shardings=batch_sharding(mesh))


@functools.cache
def _make_split(steps: int, mesh: LogicalMesh) -> Callable[[Samples], list[Samples]]:
    """A jitted function that gives the samples of each step; the inverse of `_make_join`."""

    def split(drawn: Samples) -> list[Samples]:
        rows = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]), drawn)
        return [jax.tree.map(lambda x, place=place: x[:, place], rows) for place in range(steps)]

    return jax.jit(within(mesh, split), out_shardings=batch_sharding(mesh))


def _merged(array: Array) -> Array:
    """The array with its first two axes as one."""
    return array.reshape(-1, *array.shape[2:])


@functools.cache
def _make_fill(mesh: LogicalMesh) -> Callable[[Any, Array], Any]:
    """A jitted `(tree, scores) -> tree`: a row without scores becomes a copy of a row with scores, if there is one."""

    def fill(tree: Any, scores: Float[Array, "B K"]) -> Any:
        answered, place = ~jnp.isnan(scores).any(axis=1), jnp.arange(len(scores))
        first = jnp.argsort(~answered, stable=True)  # First the rows with scores, then the others.
        other = first[place % jnp.maximum(answered.sum(), 1)]
        index = jnp.where(answered, place, other)
        return jax.tree.map(lambda array: array[index], tree)

    return jax.jit(within(mesh, fill), out_shardings=batch_sharding(mesh))


@functools.cache
def _make_select(keep: str, mesh: LogicalMesh) -> Callable[..., tuple[Array, Array, Array, Array]]:
    """A jitted `(samples, scores) -> responses, lengths, scores, log-probs` of the samples to keep."""

    def select(drawn: Samples, scores: Float[Array, "B K"] | None) -> tuple[Array, Array, Array, Array]:
        if scores is None:
            scores = jnp.full(drawn.lengths.shape, 0.5, jnp.float32)
        kept = (drawn.responses, drawn.lengths, scores, drawn.sampler_log_probs)
        if keep == "all":
            return kept
        best, last = jnp.argmax(scores, axis=1), scores.shape[1] - 1
        # If scores are equal, the first counts as the best and the last as the worst, so that the two differ.
        chosen = [best] if keep == "best" else [best, last - jnp.argmin(scores[:, ::-1], axis=1)]
        index = jnp.stack(chosen, axis=1)
        responses, lengths, scores, log_probs = (
            jnp.take_along_axis(each, index.reshape(*index.shape, *[1] * (each.ndim - 2)), axis=1) for each in kept
        )
        return responses, lengths, scores, log_probs

    return jax.jit(within(mesh, select), out_shardings=batch_sharding(mesh))
