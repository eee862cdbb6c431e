"""Contrastive losses on a pair, with a reference policy.

The formulas use the log-ratios of the two responses to the reference,
w = log pi(y_w) / ref(y_w) and l = log pi(y_l) / ref(y_l), and the margin h = w - l.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from alignment_gap.losses._checks import (
    OverTokens,
    as_preference,
    check_between,
    check_choice,
    check_positive,
    check_smoothing,
)
from alignment_gap.losses._numerics import LIMIT, tangent_exp, tangent_expm1
from alignment_gap.losses._pairs import excess_length, expected, log_ratios, over_tokens_of
from alignment_gap.losses._registry import register
from alignment_gap.losses._shapes import Array, Float, Int

Smoothing = Literal["conservative", "robust"]
NamedCurve = Literal["logistic", "square", "hinge", "exponential", "truncated_quadratic", "savage"]
Curve = Callable[[Float[Array, "*B"]], Float[Array, "*B"]]

CURVES: dict[str, Curve] = {
    "logistic": lambda z: -jax.nn.log_sigmoid(z),
    "square": lambda z: jnp.square(z - 0.5),
    "hinge": lambda z: jax.nn.relu(1.0 - z),
    "exponential": lambda z: tangent_exp(-z),
    "truncated_quadratic": lambda z: jnp.square(jax.nn.relu(1.0 - z)),
    "savage": lambda z: jnp.square(jax.nn.sigmoid(-z)),
}


@register(aliases={"sigmoid": {}, "robust": {"smoothing": "robust"}, "sigmoid_norm": {"over_tokens": "mean"}})
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

    L(h) = -log sigma(beta h). With label noise e: (1 - e) L(h) + e L(-h) if conservative, and the unbiased
    ((1 - e) L(h) - e L(-h)) / (1 - 2 e) if robust.

    arXiv 2305.18290; robust: arXiv 2403.00409. Sum over tokens; `over_tokens="mean"` is length-normalised DPO: it
    divides each log-ratio by the length of its response.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens; used only with `over_tokens="mean"`.
      beta: strength of the KL regularisation, in rewards per nat.
      label_smoothing: probability e that a label is wrong, below 1/2.
      smoothing: "conservative" or "robust".
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    check_choice("smoothing", smoothing, ("conservative", "robust"))
    check_smoothing(label_smoothing)
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = over_tokens_of(pair, chosen_lengths, rejected_lengths, over_tokens)

    def smoothed(margin: Float[Array, "*B"]) -> Float[Array, "*B"]:
        right, wrong = -jax.nn.log_sigmoid(beta * margin), -jax.nn.log_sigmoid(-beta * margin)
        if smoothing == "robust":
            return ((1.0 - label_smoothing) * right - label_smoothing * wrong) / (1.0 - 2.0 * label_smoothing)
        return (1.0 - label_smoothing) * right + label_smoothing * wrong

    return expected(smoothed, chosen - rejected, preference)


@register()
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

    (h - 1 / (2 beta))^2. With a preference p, this is the expectation over the label. It differs from
    (h - (2 p - 1) / (2 beta))^2 (see `ipo_md`) by the constant p (1 - p) / beta^2.

    arXiv 2310.12036, whose tau is beta here. Sum over tokens; `over_tokens="mean"` divides each log-ratio by the
    length of its response, as TRL does.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens; used only with `over_tokens="mean"`.
      beta: strength of the KL regularisation; the margin's target is 1 / (2 beta) nats.
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = over_tokens_of(pair, chosen_lengths, rejected_lengths, over_tokens)
    return expected(lambda margin: jnp.square(margin - 1.0 / (2.0 * beta)), chosen - rejected, preference)


@register()
def ipo_md(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> Float[Array, "*B"]:
    """IPO-MD: squared regression of the margin on a soft preference.

    (h - (2 p - 1) / (2 beta))^2, where both responses are samples from the mixture pi^(1 - b) ref^b (see
    `geometric_mixture`). No gradient passes through the sampling. With the same preference, `ipo` has the same
    gradient.

    arXiv 2403.08635. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation; the margin's target is (2 p - 1) / (2 beta) nats.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    p = as_preference(preference, chosen.shape)
    return jnp.square(chosen - rejected - (2.0 * p - 1.0) / (2.0 * beta))


@register(aliases={"exponential": {"f": "exponential"}})
def gpo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    chosen_lengths: Int[Array, "*B"] | None = None,
    rejected_lengths: Int[Array, "*B"] | None = None,
    *,
    f: NamedCurve | Curve = "logistic",
    beta: Any = 0.1,
    over_tokens: OverTokens = "sum",
) -> Float[Array, "*B"]:
    """Generalised preference optimisation: any curve of the scaled margin.

    f(beta h); with a preference, its expectation over the label. The named curves of z = beta h:

    - logistic: log(1 + exp(-z)), which is `dpo`
    - square: (z - 1/2)^2, which is beta^2 times `ipo`
    - hinge: max(0, 1 - z), which is `slic`
    - exponential: exp(-z), continued by its tangent below z = -60
    - truncated_quadratic: max(0, 1 - z)^2
    - savage: 1 / (1 + exp(z))^2, which is not convex

    arXiv 2402.05749. The paper's square is (1 - z)^2; pass `f=lambda z: (1 - z) ** 2` for it. Sum over tokens;
    `over_tokens="mean"` divides each log-ratio by the length of its response.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens; used only with `over_tokens="mean"`.
      f: a named curve, or any function of z; for a preference loss it is convex and decreasing at 0.
      beta: strength of the KL regularisation, in rewards per nat.
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    if not callable(f):
        check_choice("f", f, CURVES)
    curve = f if callable(f) else CURVES[f]
    pair = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen, rejected = over_tokens_of(pair, chosen_lengths, rejected_lengths, over_tokens)
    return expected(lambda margin: curve(beta * margin), chosen - rejected, preference)


@register(aliases={"hinge": {}})
def slic(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
) -> Float[Array, "*B"]:
    """Sequence likelihood calibration on log-ratios: the hinge loss.

    max(0, 1 - beta h). `slic_hf` is the form on raw log-probs with a supervised term.

    arXiv 2305.10425 for the hinge, 2309.06657 for its form on log-ratios. Sum over tokens; for the mean pass
    log-probs divided by their lengths.

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
    return gpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, preference, f="hinge", beta=beta)


@register()
def discopop(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
    tau: float = 0.05,
) -> Float[Array, "*B"]:
    """DiscoPOP, the log-ratio modulated loss.

    With z = beta h and m = sigma(z / tau): (1 - m) log(1 + exp(-z)) + m exp(-z). The loss is not convex. Its slope at
    z = 0, (1 - log 2) / (4 tau) - 3/4, is positive if tau < 0.102. Training from the reference then first lowers the
    margin.

    arXiv 2406.08414. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat.
      tau: temperature of the modulation, in units of z.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta, tau=tau)

    def modulated(z: Float[Array, "*B"]) -> Float[Array, "*B"]:
        # One exponent for both factors: exp(-z) alone would overflow where the modulation drives the product to 0.
        exponential = tangent_exp(jax.nn.log_sigmoid(z / tau) - z)
        return -jax.nn.sigmoid(-z / tau) * jax.nn.log_sigmoid(z) + exponential

    return gpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, preference, f=modulated, beta=beta)


@register(aliases={"exo_pair": {}})
def exo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
    label_smoothing: float = 1e-3,
) -> Float[Array, "*B"]:
    """Efficient exact optimisation on a pair: the reverse KL to the labels' distribution.

    KL(q || r), q = (sigma(beta h), sigma(-beta h)), r = ((1 - e) p + e (1 - p), the rest).

    arXiv 2402.00856, eq. 16. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat.
      label_smoothing: e, in (0, 1/2); at e = 0 the divergence from a hard label is infinite.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    if not 0.0 < label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in (0, 0.5), got {label_smoothing}")
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    z = beta * (chosen - rejected)
    p = as_preference(preference, z.shape)
    p = (1.0 - label_smoothing) * p + label_smoothing * (1.0 - p)
    return jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - jnp.log(p)) + jax.nn.sigmoid(-z) * (
        jax.nn.log_sigmoid(-z) - jnp.log1p(-p)
    )


@register()
def f_dpo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl",
    alpha: float = 0.5,
) -> Float[Array, "*B"]:
    """DPO with a divergence other than the reverse KL.

    -log sigma(beta (g(w) - g(l))), where g is the divergence's f' at the ratio u = exp(log-ratio):

    - reverse_kl: log u, which is `dpo`
    - forward_kl: 1 - 1 / u
    - jensen_shannon: log(2 u / (1 + u))
    - alpha: (1 - u^-alpha) / alpha, which is reverse_kl as alpha -> 0 and forward_kl at alpha = 1

    Powers of u above exp(60) are continued by their tangent.

    arXiv 2309.16240. TRL's coefficient of the alpha divergence is 1 - alpha. Sum over tokens.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the regularisation, in rewards per unit of f'.
      divergence: "reverse_kl", "forward_kl", "jensen_shannon" or "alpha".
      alpha: order of the alpha divergence, above 0; used only with `divergence="alpha"`.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta, alpha=alpha)
    check_choice("divergence", divergence, ("reverse_kl", "forward_kl", "jensen_shannon", "alpha"))
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    order = 1.0 if divergence == "forward_kl" else alpha

    def link(log_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
        if divergence == "reverse_kl":
            return log_ratio
        if divergence == "jensen_shannon":
            return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)
        return -tangent_expm1(-order * log_ratio) / order

    margin = beta * (link(chosen) - link(rejected))
    return expected(lambda z: -jax.nn.log_sigmoid(z), margin, preference)


@register()
def chi_po(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
    gamma: float = 1.0,
    max_margin: float | None = None,
    max_log_ratio: float = 20.0,
) -> Float[Array, "*B"]:
    """chi-PO: DPO with the mixed chi-squared and KL divergence.

    -log sigma(clip(beta (phi(w) - phi(l)), max_margin)), phi(log u) = u + gamma log u.

    arXiv 2407.13399; the paper clips at 2 R_max and uses gamma = 1. Sum over tokens.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the regularisation, in rewards per unit of phi.
      gamma: weight of the KL part.
      max_margin: bound on the absolute scaled margin; beyond it the gradient is zero. None sets no bound.
      max_log_ratio: cap on log u inside the term u only, so that u stays finite; at most 60.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    check_between(0.0, math.inf, gamma=gamma)
    check_between(0.0, LIMIT, max_log_ratio=max_log_ratio)
    if max_margin is not None:
        check_positive(max_margin=max_margin)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)

    def phi(log_ratio: Float[Array, "*B"]) -> Float[Array, "*B"]:
        return jnp.exp(jnp.minimum(log_ratio, max_log_ratio)) + gamma * log_ratio

    margin = beta * (phi(chosen) - phi(rejected))
    if max_margin is not None:
        margin = jnp.clip(margin, -max_margin, max_margin)
    return expected(lambda z: -jax.nn.log_sigmoid(z), margin, preference)


@register()
def r_dpo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    preference: Float[Array, "*B"] | float | None = None,
    chosen_lengths: Int[Array, "*B"] | None = None,
    rejected_lengths: Int[Array, "*B"] | None = None,
    *,
    beta: Any = 0.1,
    alpha: float = 0.01,
) -> Float[Array, "*B"]:
    """R-DPO: DPO with a length penalty in the rewards.

    -log sigma(beta h + alpha (|y_w| - |y_l|)): if the chosen response is longer, the length term explains part of the
    preference, and the policy needs a smaller margin. The form without a reference is `cpo` with a `length_penalty`.

    arXiv 2403.19159. Sum over tokens.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_lengths, rejected_lengths: [*B], numbers of scored tokens.
      beta: strength of the KL regularisation, in rewards per nat.
      alpha: penalty, in rewards per token.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    longer = excess_length(chosen_lengths, rejected_lengths, chosen.shape)
    return expected(lambda z: -jax.nn.log_sigmoid(z), beta * (chosen - rejected) + alpha * longer, preference)
