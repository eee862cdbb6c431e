"""Sources, which give the batch of a step, and wrappers that add arrays to the batches of a source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.models import Policy, score
from alignment_gap.sharding import LogicalMesh, batch_sharding, within
from alignment_gap.training.state import TrainState

# Gives a batch on the devices: a function of the step, and of the state that the step will update.
Source = Callable[[int, TrainState], PreferenceBatch]
# (params, prompts, prompt_lengths, responses, response_lengths) -> log-probs [B, K, R] in nats.
TokenLogProbs = Callable[..., Float[Array, "B K R"]]


@functools.cache
def make_score(policy: Policy, mesh: LogicalMesh) -> TokenLogProbs:
    """A jitted `(params, prompts, prompt_lengths, responses, response_lengths) -> log-probs [B, K, R]` in nats."""
    return jax.jit(within(mesh, lambda *arrays: score(policy, *arrays)), out_shardings=batch_sharding(mesh))


def with_fresh(source: Source, second: Source) -> Source:
    """A source whose batches also carry a second source's batch, such as fresh samples along with recorded pairs."""
    return lambda step, state: dataclasses.replace(source(step, state), fresh=second(step, state))


def with_mismatched(source: Source, mesh: LogicalMesh) -> Source:
    """A source whose batches also pair every prompt with the next prompt's responses, for KTO's KL term."""
    mismatch = _make_mismatch(mesh)

    def attached(step: int, state: TrainState) -> PreferenceBatch:
        batch = source(step, state)
        return dataclasses.replace(batch, mismatched=mismatch(batch))

    return attached


def with_reference(source: Source, score: TokenLogProbs, reference: Callable[[TrainState], Any]) -> Source:
    """A source that adds the reference's log-probs to each batch, and to its `fresh` and `mismatched`, if missing.

    Args:
      source: gives the batches.
      score: from `make_score`, the same function that the policy's evaluation uses.
      reference: gives the reference's parameters for a state.
    """

    def scored(batch: PreferenceBatch | None, params: Any) -> PreferenceBatch | None:
        if batch is None or batch.reference_log_probs is not None:
            return batch
        texts = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
        return dataclasses.replace(batch, reference_log_probs=score(params, *texts))

    def attached(step: int, state: TrainState) -> PreferenceBatch:
        batch, params = source(step, state), reference(state)
        fresh, mismatched = scored(batch.fresh, params), scored(batch.mismatched, params)
        whole = scored(batch, params)
        assert whole is not None
        return dataclasses.replace(whole, fresh=fresh, mismatched=mismatched)

    return attached


@functools.cache
def _make_mismatch(mesh: LogicalMesh) -> Callable[[PreferenceBatch], PreferenceBatch]:
    def mismatch(batch: PreferenceBatch) -> PreferenceBatch:
        responses, lengths = (jnp.roll(array, -1, axis=0) for array in (batch.responses, batch.response_lengths))
        prompts = (batch.prompt_ids, batch.prompts, batch.prompt_lengths)
        return PreferenceBatch(*prompts, responses, lengths, jnp.zeros_like(batch.scores))

    return jax.jit(within(mesh, mismatch), out_shardings=batch_sharding(mesh))
