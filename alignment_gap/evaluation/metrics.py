"""Metrics of a checkpoint: one value for each prompt or pair, so that every mean has an interval."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignment_gap import losses
from alignment_gap.data.batches import length_mask
from alignment_gap.judges import PROBABILITIES
from alignment_gap.models import Policy, response_hidden
from alignment_gap.sharding import LogicalMesh, batch_sharding, within


@functools.cache
def make_divergence(policy: Policy, mesh: LogicalMesh) -> Callable[..., Float[Array, "B"]]:
    """A jitted `(params, reference_params, prompts, prompt_lengths, responses [B, 1, R], lengths [B, 1]) -> KL [B]`.

    The paper's estimator of KL(policy || reference) in nats. For one response y drawn from the policy, it sums the
    exact categorical KL of every token over the vocabulary: sum_t KL(policy(.|x, y_<t) || reference(.|x, y_<t)).
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


def preferences(scores: Float[np.ndarray, "N 2"], kind: str) -> Float[np.ndarray, "N"]:
    """A judge's preference for the first of two responses: a probability, or 1, 0 or 0.5 from comparing rewards."""
    if kind == PROBABILITIES:
        return scores[:, 0].astype(np.float64)
    return (np.sign(scores[:, 0] - scores[:, 1]).astype(np.float64) + 1) / 2


def classification(
    log_probs: Float[np.ndarray, "N 2 R"], reference: Float[np.ndarray, "N 2 R"], scores: Float[np.ndarray, "N 2"]
) -> dict[str, Float[np.ndarray, "N"]]:
    """How a policy classifies labelled pairs, and how far it moved from SFT on each response.

    Args:
      log_probs: log-probs of both responses' tokens under the policy, 0 at padding.
      reference: the same under the SFT policy.
      scores: the labels; the response with the higher score is the winner.

    Returns:
      accuracy: 1 if f = log pi(winner)/pi(loser) - log pi_sft(winner)/pi_sft(loser) > 0, 0 if f < 0, else 0.5; also
        0.5 if the label is a tie.
      chosen_log_ratio, rejected_log_ratio: log pi/pi_sft of winner and loser, in nats; of a tie, of the first and the
        second response.
    """
    ratios = (log_probs - reference).sum(-1, dtype=np.float64)
    rows, winner = np.arange(len(scores)), np.argmax(scores, axis=1)
    chosen, rejected = ratios[rows, winner], ratios[rows, 1 - winner]
    return {
        "accuracy": np.where(scores[:, 0] == scores[:, 1], 0.5, (np.sign(chosen - rejected) + 1) / 2),
        "chosen_log_ratio": chosen,
        "rejected_log_ratio": rejected,
    }
