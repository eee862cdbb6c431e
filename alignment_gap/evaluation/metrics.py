"""What a checkpoint is measured by, as one value per prompt or pair, so that every mean has its interval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignment_gap import losses
from alignment_gap.data.batches.batch import length_mask
from alignment_gap.models import Policy, PreferenceModel, response_hidden
from alignment_gap.sharding import LogicalMesh, batch_sharding, put_batch, within


def make_judge(model: PreferenceModel, mesh: LogicalMesh) -> Callable[..., Float[Array, "B"]]:
    """A jitted `(params, prompts, prompt_lengths, first, first_lengths, second, second_lengths) -> wins [B]`.

    1 where the first response wins by the sign rule, 0 where it loses, 0.5 at a tie.
    """

    def judge(
        params: Any,
        prompts: Array,
        lengths: Array,
        first: Array,
        first_lengths: Array,
        second: Array,
        second_lengths: Array,
    ) -> Array:
        responses, response_lengths = jnp.stack([first, second], 1), jnp.stack([first_lengths, second_lengths], 1)
        return model.preferences(params, prompts, lengths, responses, response_lengths)

    return jax.jit(within(mesh, judge), out_shardings=batch_sharding(mesh))


def make_divergence(policy: Policy, mesh: LogicalMesh) -> Callable[..., Float[Array, "B"]]:
    """A jitted `(params, reference_params, prompts, prompt_lengths, responses [B, 1, R], lengths [B, 1]) -> KL [B]`.

    The paper's estimator of KL(policy || reference) in nats: for one response y drawn from the policy the exact
    categorical KL over the vocabulary at every token, sum_t KL(policy(.|x, y_<t) || reference(.|x, y_<t)).
    """

    def divergence(
        params: Any, reference_params: Any, prompts: Array, lengths: Array, responses: Array, response_lengths: Array
    ) -> Array:
        hidden, reference = (
            response_hidden(policy, p, prompts, lengths, responses) for p in (params, reference_params)
        )
        embedding, scale, soft_cap = policy.output(params)
        reference_embedding = policy.output(reference_params).embedding
        per_token = losses.token_kl(hidden, embedding, reference, reference_embedding, scale=scale, soft_cap=soft_cap)
        mask = length_mask(response_lengths, responses.shape[-1])
        return jnp.where(mask, per_token, 0.0).sum((-1, -2))

    return jax.jit(within(mesh, divergence), out_shardings=batch_sharding(mesh))


def in_batches(
    function: Callable[..., Any], arrays: tuple[np.ndarray, ...], *, batch_size: int, mesh: LogicalMesh
) -> Any:
    """Applies a jitted function to slices of equal size of the arrays' first axis; returns its results on the host.

    The last slice is filled up with the first rows, whose results are dropped.
    """
    count = len(arrays[0])
    padded = np.resize(np.arange(count), -(-count // batch_size) * batch_size)
    results = []
    for start in range(0, len(padded), batch_size):
        rows = padded[start : start + batch_size]
        on_device = put_batch(tuple(array[rows] for array in arrays), mesh, batch_size)
        results.append(jax.device_get(function(*on_device)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)


def classification(
    log_probs: Float[np.ndarray, "N 2 R"], reference: Float[np.ndarray, "N 2 R"], scores: Float[np.ndarray, "N 2"]
) -> dict[str, Float[np.ndarray, "N"]]:
    """How a policy classifies labelled pairs, and how far it moved on both sides.

    Args:
      log_probs: of both responses' tokens under the policy, 0 at padding.
      reference: the same under the SFT policy.
      scores: the label; the higher is the better one.

    Returns:
      accuracy: 1 where f = log pi(winner)/pi(loser) - log pi_sft(winner)/pi_sft(loser) > 0, 0 where < 0, else 0.5.
      chosen_log_ratio, rejected_log_ratio: log pi/pi_sft of winner and loser in nats.
    """
    ratios = (log_probs - reference).sum(-1, dtype=np.float64)
    rows, winner = np.arange(len(scores)), np.argmax(scores, axis=1)
    chosen, rejected = ratios[rows, winner], ratios[rows, 1 - winner]
    return {
        "accuracy": (np.sign(chosen - rejected) + 1) / 2,
        "chosen_log_ratio": chosen,
        "rejected_log_ratio": rejected,
    }
