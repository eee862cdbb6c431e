"""Diagnostics for any pairwise loss."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from alignment_gap.losses._checks import as_preference
from alignment_gap.losses._pairs import log_ratios
from alignment_gap.losses._shapes import Array, Float


def pairwise_diagnostics(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> dict[str, Float[Array, "*B"]]:
    """Margin, implicit rewards, accuracy and log-ratios of every pair.

    margin = h = w - l, where w and l are the log-ratios of the chosen and the rejected response to the reference.
    The reward of a response is beta times its log-ratio. accuracy = p 1[h > 0] + (1 - p) 1[h < 0]; a tie (h = 0)
    counts as 1/2. arXiv 2305.18290 (implicit reward), 2405.08448 (classification by the policy).
    Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat; it scales the rewards only.

    Returns:
      A dict of float32 [*B] arrays: `margin`, `chosen_reward`, `rejected_reward`, `accuracy`, `chosen_log_ratio`,
      `rejected_log_ratio`.

    Raises:
      AssertionError: shapes or types do not fit.
    """
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    preference = as_preference(preference, chosen.shape)
    agreement = 0.5 * (1.0 + jnp.sign(chosen - rejected))
    return {
        "margin": chosen - rejected,
        "chosen_reward": beta * chosen,
        "rejected_reward": beta * rejected,
        "accuracy": preference * agreement + (1.0 - preference) * (1.0 - agreement),
        "chosen_log_ratio": chosen,
        "rejected_log_ratio": rejected,
    }
