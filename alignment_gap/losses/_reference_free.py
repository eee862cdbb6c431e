"""Contrastive losses on a pair, without a reference policy."""

from __future__ import annotations

import math
from typing import Any

import jax

from alignment_gap.losses._checks import OverTokens, check_between, check_positive
from alignment_gap.losses._numerics import log1mexp
from alignment_gap.losses._pairs import Pair, as_pair, excess_length, expected, expected_over_sides, over_tokens_of
from alignment_gap.losses._registry import register
from alignment_gap.losses._shapes import Array, Float, Int


@register()
def simpo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    chosen_lengths: Int[Array, "*B"],
    rejected_lengths: Int[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 2.0,
    gamma: Any = 1.0,
) -> Float[Array, "*B"]:
    """SimPO: a margin between length-normalised log-probs.

    -log sigma(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma).

    arXiv 2405.14734. Mean over tokens; for the sum, pass lengths of 1. With a preference it is the expectation over the
    label; gamma is then the target margin of whichever response the label prefers.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: scale of the rewards per nat.
      gamma: target margin of the rewards.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    pair = _means(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    return expected(lambda margin: -jax.nn.log_sigmoid(beta * margin - gamma), pair[0] - pair[1], preference)


@register()
def orpo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    chosen_lengths: Int[Array, "*B"],
    rejected_lengths: Int[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> Float[Array, "*B"]:
    """Odds ratio preference optimisation: supervised loss plus a log-odds contrast.

    -m_w - beta log sigma(o_w - o_l), m = log pi(y) / |y|, o = m - log(1 - exp(m)).

    arXiv 2403.07691, whose lambda is beta. Mean over tokens in both terms; for the sum, pass lengths of 1. In
    log(1 - exp(m)), an m above -1e-7 counts as -1e-7.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: weight of the contrast.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_between(0.0, math.inf, beta=beta)
    pair = _means(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)

    def loss(better: Float[Array, "*B"], worse: Float[Array, "*B"]) -> Float[Array, "*B"]:
        log_odds_ratio = (better - log1mexp(better)) - (worse - log1mexp(worse))
        return -better - beta * jax.nn.log_sigmoid(log_odds_ratio)

    return expected_over_sides(loss, pair, preference)


@register()
def cpo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    chosen_lengths: Int[Array, "*B"] | None = None,
    rejected_lengths: Int[Array, "*B"] | None = None,
    *,
    beta: Any = 0.1,
    sft_weight: float = 1.0,
    length_penalty: float = 0.0,
    over_tokens: OverTokens = "sum",
) -> Float[Array, "*B"]:
    """Contrastive preference optimisation: DPO with a uniform reference, plus a supervised term.

    -log sigma(beta (log pi(y_w) - log pi(y_l)) + a (|y_w| - |y_l|)) - sft_weight log pi(y_w).

    arXiv 2401.08417; the length penalty a is the same as in `r_dpo`. Sum over tokens in both terms;
    `over_tokens="mean"` divides only the supervised term by the length.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens; used only with `over_tokens="mean"` or
        a `length_penalty`.
      beta: scale of the rewards per nat.
      sft_weight: weight of the supervised term.
      length_penalty: a, in rewards per token.
      over_tokens: "sum" or "mean", for the supervised term.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    check_between(0.0, math.inf, sft_weight=sft_weight)
    pair = chosen, rejected = as_pair(chosen_logps, rejected_logps)
    margin = beta * (chosen - rejected)
    if length_penalty:
        margin = margin + length_penalty * excess_length(chosen_lengths, rejected_lengths, margin.shape)
    contrast = expected(lambda z: -jax.nn.log_sigmoid(z), margin, preference)
    targets = over_tokens_of(pair, chosen_lengths, rejected_lengths, over_tokens)
    return contrast + sft_weight * expected_over_sides(lambda better, worse: -better, targets, preference)


@register()
def slic_hf(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    delta: float = 1.0,
    sft_weight: float = 1.0,
) -> Float[Array, "*B"]:
    """SLiC-HF: a hinge on raw log-probs, plus a supervised term.

    max(0, delta - log pi(y_w) + log pi(y_l)) - sft_weight log pi(y_w).

    arXiv 2305.10425, whose supervised targets may also be other responses. Sum over tokens; for the mean, pass
    log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      delta: margin, in nats.
      sft_weight: weight of the supervised term.

    Returns:
      float32 [*B].

    Raises:
      AssertionError: shapes or types do not fit.
    """
    pair = chosen, rejected = as_pair(chosen_logps, rejected_logps)
    calibration = expected(lambda margin: jax.nn.relu(delta - margin), chosen - rejected, preference)
    return calibration + sft_weight * expected_over_sides(lambda better, worse: -better, pair, preference)


def _means(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    chosen_lengths: Int[Array, "*B"],
    rejected_lengths: Int[Array, "*B"],
) -> Pair:
    """Length-normalised log-probs of both sides."""
    return over_tokens_of(as_pair(chosen_logps, rejected_logps), chosen_lengths, rejected_lengths, "mean")
