"""The on-policy source: fresh samples of the current policy, scored by a labeller."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.models import Policy, PreferenceModel
from alignment_gap.sampling.sampler import SamplerConfig, sample, sample_keys
from alignment_gap.sharding import LogicalMesh, batch_sharding, within

# Scores [B, K] of responses: (prompts, prompt_lengths, responses, response_lengths) -> scores, on the device.
Labeller = Callable[[Array, Array, Array, Array], Float[Array, "B K"]]


def make_generate(
    policy: Policy, mesh: LogicalMesh, *, samples: int, max_length: int, eos_id: int, config: SamplerConfig
) -> Callable[..., Any]:
    """A jitted `(params, run_key, step, prompt_ids, prompts, prompt_lengths) -> Samples`, sharded over the batch."""

    def generate(params: Any, run_key: Key[Array, ""], step: Array, ids: Array, prompts: Array, lengths: Array) -> Any:
        keys = sample_keys(run_key, step, ids, samples)
        return sample(policy, params, prompts, lengths, keys, max_length=max_length, eos_id=eos_id, config=config)

    return jax.jit(within(mesh, generate), out_shardings=batch_sharding(mesh))


def preference_labeller(model: PreferenceModel, params: Any, mesh: LogicalMesh) -> Labeller:
    """Labels by a preference model's hard sign rule."""
    scores = _make_scores(model, mesh)
    return lambda *batch: scores(params, *batch)


@functools.cache
def _make_scores(model: PreferenceModel, mesh: LogicalMesh) -> Callable[..., Float[Array, "B K"]]:
    """One jitted function for all parameters of a model."""
    return jax.jit(within(mesh, model.scores), out_shardings=batch_sharding(mesh))


def online_source(
    prompts: Callable[[int], PreferenceBatch],
    generate: Callable[..., Any],
    labeller: Labeller,
    run_key: Key[Array, ""],
) -> Callable[[int, Any], PreferenceBatch]:
    """Batches of fresh samples: a source for the same update step that offline batches feed.

    Args:
      prompts: the prompts of a step, in the form of a batch; its responses and scores are not looked at.
      generate: from `make_generate`.
      labeller: scores the samples.
      run_key: with step and prompt id it decides every sample.

    Returns:
      `(step, state) -> batch` for `alignment_gap.training.loop.train`; samples come from `state.params`.
    """

    def source(step: int, state: Any) -> PreferenceBatch:
        batch = prompts(step)
        drawn = generate(state.params, run_key, state.step, batch.prompt_ids, batch.prompts, batch.prompt_lengths)
        scores = labeller(batch.prompts, batch.prompt_lengths, drawn.responses, drawn.lengths)
        return PreferenceBatch(
            batch.prompt_ids, batch.prompts, batch.prompt_lengths, drawn.responses, drawn.lengths, scores
        )

    return source
