"""Contrastive losses that need the two sides separately, not only the margin.

As in `_pairwise`, w and l are the log-ratios of the chosen and the rejected response to the reference.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from alignment_gap.losses._checks import (
    as_float32,
    as_preference,
    check_between,
    check_choice,
    check_positive,
    check_smoothing,
)
from alignment_gap.losses._pairs import expected_over_sides, log_ratios
from alignment_gap.losses._registry import OTHER_PROMPTS, PROBABILITIES, register
from alignment_gap.losses._shapes import Array, Float


@register(aliases={"nca_pair": {}})
def nca(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> Float[Array, "*B"]:
    """Noise contrastive alignment of a pair.

    -log sigma(beta w) - 1/2 log sigma(-beta w) - 1/2 log sigma(-beta l).

    arXiv 2402.05369. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)

    def loss(better: Float[Array, "*B"], worse: Float[Array, "*B"]) -> Float[Array, "*B"]:
        noise = jax.nn.log_sigmoid(-beta * better) + jax.nn.log_sigmoid(-beta * worse)
        return -jax.nn.log_sigmoid(beta * better) - 0.5 * noise

    return expected_over_sides(loss, pair, preference)


@register(
    aliases={"bco_pair": {"shift": 0.0}},
    reads=lambda settings: (OTHER_PROMPTS,) if isinstance(settings["shift"], str) else (),
)
def bco(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
    shift: Any = "batch_mean",
) -> Float[Array, "*B"]:
    """Binary classifier optimisation of a pair.

    -log sigma(beta w - d) - log sigma(d - beta l). The shift d is the mean of beta w and beta l over the batch and both
    sides, without gradient, or a given number.

    arXiv 2404.04656. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat.
      shift: "batch_mean" (over all of *B), or a number: 0 for no shift, or a running mean of your own.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if isinstance(shift, str):
        check_choice("shift", shift, ("batch_mean",))
        shift = lax.stop_gradient(0.5 * beta * (jnp.mean(chosen) + jnp.mean(rejected)))

    def loss(better: Float[Array, "*B"], worse: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return -jax.nn.log_sigmoid(beta * better - shift) - jax.nn.log_sigmoid(shift - beta * worse)

    return expected_over_sides(loss, (chosen, rejected), preference)


@register(aliases={"sppo_hard": {}})
def sppo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> Float[Array, "*B"]:
    """Self-play preference optimisation: regression of each log-ratio on its centred preference.

    (w - (p - 1/2) / beta)^2 + (l - (1/2 - p) / beta)^2. Hard labels have p = 1; soft labels may have any p.

    arXiv 2405.00675, whose eta is 1 / beta. Here p enters the targets, so this is not an expectation over the label.
    Sum over tokens.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation; with p = 1 the chosen response's target is 1 / (2 beta) nats.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    target = (as_preference(preference, chosen.shape) - 0.5) / beta
    return jnp.square(chosen - target) + jnp.square(rejected + target)


@register()
def apo_zero(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> Float[Array, "*B"]:
    """Anchored preference optimisation, zero: raises the winner and lowers the loser.

    1 - sigma(beta w) + sigma(beta l).

    arXiv 2408.06266, eq. 7. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return expected_over_sides(
        lambda better, worse: jax.nn.sigmoid(-beta * better) + jax.nn.sigmoid(beta * worse), pair, preference
    )


@register()
def apo_down(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> Float[Array, "*B"]:
    """Anchored preference optimisation, down: lowers both, the loser more.

    sigma(beta w) + 1 - sigma(beta (w - l)).

    arXiv 2408.06266, eq. 8. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return expected_over_sides(
        lambda better, worse: jax.nn.sigmoid(beta * better) + jax.nn.sigmoid(-beta * (better - worse)),
        pair,
        preference,
    )


@register(aliases={"aot_unpaired": {"coupling": "unpaired"}}, reads=(OTHER_PROMPTS,))
def aot(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    *,
    beta: Any = 0.1,
    label_smoothing: float = 0.0,
    coupling: Literal["paired", "unpaired"] = "paired",
) -> Float[Array, "*B"]:
    """Alignment by optimal transport: DPO between sorted batches.

    (1 - e) L(d) + e L(-d), L(d) = -log sigma(beta d), where d pairs the i-th smallest values of the batch:

    - paired: d = sort(log pi(y_w) / pi(y_l)) - sort(log ref(y_w) / ref(y_l))
    - unpaired: d = sort(w) - sort(l)

    arXiv 2406.05882. The sort is over all of *B. Value i of the result belongs to rank i, not to example i, so the loss
    takes no preference per example. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      beta: strength of the KL regularisation, in rewards per nat.
      label_smoothing: probability e that a label is wrong, below 1/2.
      coupling: "paired" or "unpaired".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    check_smoothing(label_smoothing)
    check_choice("coupling", coupling, ("paired", "unpaired"))
    chosen, rejected, ref_chosen, ref_rejected = as_float32(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    if coupling == "paired":
        above, below = chosen - rejected, ref_chosen - ref_rejected
    else:
        above, below = chosen - ref_chosen, rejected - ref_rejected
    z = beta * (jnp.sort(above, axis=None) - jnp.sort(below, axis=None)).reshape(chosen.shape)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


@register(reads=(OTHER_PROMPTS, PROBABILITIES))
def kto(
    logps: Float[Array, "*B"],
    ref_logps: Float[Array, "*B"],
    scores: Float[Array, "*B"],
    kl_logps: Float[Array, "*N"] | None = None,
    ref_kl_logps: Float[Array, "*N"] | None = None,
    *,
    beta: Any = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*B"]:
    """Kahneman-Tversky optimisation of single responses.

    s D (1 - sigma(beta (r - z))) + (1 - s) U (1 - sigma(beta (z - r))), where r = log pi / ref and
    z = max(0, mean of log pi / ref over the KL responses), without gradient.

    arXiv 2402.01306. The KL responses (`kl_logps`) answer other prompts. Without them, z uses the batch's own
    responses. Equal `kl_logps` and `ref_kl_logps` give z = 0. Sum over tokens.

    Args:
      logps: [*B], token-summed log-probs under the policy, in nats; any shape, also [prompts, K].
      ref_logps: [*B], the same under the reference.
      scores: [*B], probability s in [0, 1] that the response is desirable.
      kl_logps, ref_kl_logps: log-probs of mismatched responses under the policy and the reference, or None. Both have
        the same shape; it may differ from the shape of `logps`.
      beta: strength of the KL regularisation, in rewards per nat.
      desirable_weight, undesirable_weight: D and U.

    Returns:
      float32 [*B], one value per response.

    Raises:
      ValueError: a setting is out of range, or only one of the two KL arrays is given.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    check_between(0.0, math.inf, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if (kl_logps is None) != (ref_kl_logps is None):
        raise ValueError("kl_logps and ref_kl_logps belong together: give both, or none")
    logps, ref_logps, scores = as_float32(logps=logps, ref_logps=ref_logps, scores=scores)
    ratio = logps - ref_logps
    baseline = ratio
    if kl_logps is not None:
        kl_logps, ref_kl_logps = as_float32(kl_logps=kl_logps, ref_kl_logps=ref_kl_logps)
        baseline = kl_logps - ref_kl_logps
    z = lax.stop_gradient(jnp.maximum(jnp.mean(baseline), 0.0))
    desirable = desirable_weight * jax.nn.sigmoid(beta * (z - ratio))
    undesirable = undesirable_weight * jax.nn.sigmoid(beta * (ratio - z))
    return scores * desirable + (1.0 - scores) * undesirable
