"""Contrastive losses of a pair, with a reference policy.

All of them are written in the log-ratios of the two responses to the reference,
w = log pi(y_w) / ref(y_w) and l = log pi(y_l) / ref(y_l), and the margin h = w - l.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignment_gap.losses._checks import OverTokens, check_choice, check_positive
from alignment_gap.losses._pairs import expected, log_ratios, over_tokens_of

Smoothing = Literal["conservative", "robust"]


def dpo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    chosen_lengths: Int[Array, "*B"] | None = None,
    rejected_lengths: Int[Array, "*B"] | None = None,
    *,
    beta: Any = 0.1,
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "conservative",
    over_tokens: OverTokens = "sum",
) -> Float[Array, "*B"]:
    """Direct preference optimisation.

    -log sigma(beta h). With label noise e: (1 - e) L(h) + e L(-h) if conservative, and the unbiased
    ((1 - e) L(h) - e L(-h)) / (1 - 2 e) if robust.

    arXiv 2305.18290; robust: arXiv 2403.00409. Sum over tokens; `over_tokens="mean"` is length-normalised DPO, where
    each log-ratio is divided by the length of its response.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens; read only with `over_tokens="mean"`.
      beta: strength of the KL regularisation, in rewards per nat.
      label_smoothing: probability e that a label is wrong, below 1/2.
      smoothing: "conservative" or "robust".
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range. AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    check_choice("smoothing", smoothing, ("conservative", "robust"))
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = over_tokens_of(pair, chosen_lengths, rejected_lengths, over_tokens)

    def smoothed(margin: Float[Array, "*B"]) -> Float[Array, "*B"]:
        right, wrong = -jax.nn.log_sigmoid(beta * margin), -jax.nn.log_sigmoid(-beta * margin)
        if smoothing == "robust":
            return ((1.0 - label_smoothing) * right - label_smoothing * wrong) / (1.0 - 2.0 * label_smoothing)
        return (1.0 - label_smoothing) * right + label_smoothing * wrong

    return expected(smoothed, chosen - rejected, preference)


def ipo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    chosen_lengths: Int[Array, "*B"] | None = None,
    rejected_lengths: Int[Array, "*B"] | None = None,
    *,
    beta: Any = 0.1,
    over_tokens: OverTokens = "sum",
) -> Float[Array, "*B"]:
    """Identity preference optimisation.

    (h - 1 / (2 beta))^2; with a preference p in expectation over the label, which differs from
    (h - (2 p - 1) / (2 beta))^2 (see `ipo_md`) by the constant p (1 - p) / beta^2.

    arXiv 2310.12036, whose tau is beta here. Sum over tokens; `over_tokens="mean"` divides each log-ratio by the
    length of its response, as TRL does.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens; read only with `over_tokens="mean"`.
      beta: strength of the KL regularisation; the margin's target is 1 / (2 beta) nats.
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range. AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = over_tokens_of(pair, chosen_lengths, rejected_lengths, over_tokens)
    return expected(lambda margin: jnp.square(margin - 1.0 / (2.0 * beta)), chosen - rejected, preference)
