"""KL from the reference, and entropy: estimates from samples, and exact values over a vocabulary."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from alignment_gap.losses._checks import as_float32, check_choice
from alignment_gap.losses._numerics import tangent_expm1
from alignment_gap.losses._registry import OWN_SAMPLES, register
from alignment_gap.losses._shapes import Array, Float


def kl_estimate(
    logps: Float[Array, "*B"],
    ref_logps: Float[Array, "*B"],
    *,
    estimator: Literal["k1", "k2", "k3"] = "k3",
) -> Float[Array, "*B"]:
    """Estimates of KL(pi || ref) from samples of pi.

    With x = log pi - log ref:

    - k1 = x: unbiased
    - k2 = x^2 / 2: biased, with low variance
    - k3 = exp(-x) - 1 + x: unbiased and never negative; continued by its tangent below x = -60

    Schulman 2020, "Approximating KL divergence". The gradients with the samples held fixed differ, in expectation: k1
    has gradient zero, k2 has the gradient of KL(pi || ref), and k3 has the gradient of KL(ref || pi), although its
    value estimates KL(pi || ref). As a regulariser use k2, `online_kl` or the exact sum.

    Args:
      logps: log-probs under the policy of its own samples, in nats: `[*B]` for responses, or `[*B, T]` for tokens.
      ref_logps: the same under the reference.
      estimator: "k1", "k2" or "k3".

    Returns:
      float32 of the input's shape, nats: one value for each response or token, without a sum.

    Raises:
      ValueError: the estimator is unknown.
      AssertionError: shapes or types do not fit.
    """
    check_choice("estimator", estimator, ("k1", "k2", "k3"))
    logps, ref_logps = as_float32(logps=logps, ref_logps=ref_logps)
    x = logps - ref_logps
    if estimator == "k1":
        return x
    return 0.5 * jnp.square(x) if estimator == "k2" else tangent_expm1(-x) + x


@register(reads=(OWN_SAMPLES,))
def online_kl(logps: Float[Array, "*B K"], ref_logps: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """KL(pi || ref) at the policy's own samples, with its true gradient.

    Value: the mean over K of x = log pi / ref. Gradient: the mean over K of (x_k - b_k) grad log pi(y_k), where b_k is
    the mean of x over the other responses, or 0 if K is 1.

    arXiv 2406.01462, which adds it to DPO (see `hypo`). Sum over tokens.

    Args:
      logps: [*B, K], token-summed log-probs of the policy's own samples, in nats.
      ref_logps: [*B, K], the same under the reference.

    Returns:
      float32 [*B], nats.

    Raises:
      AssertionError: shapes or types do not fit.
    """
    logps, ref_logps = as_float32(logps=logps, ref_logps=ref_logps)
    ratios = lax.stop_gradient(logps - ref_logps)
    size = logps.shape[-1]
    weights = ratios if size == 1 else (ratios - jnp.mean(ratios, axis=-1, keepdims=True)) * (size / (size - 1))
    # The difference of log-probs is zero in value; it only carries the gradient.
    return jnp.mean(ratios + weights * (logps - lax.stop_gradient(logps)), axis=-1)


def categorical_kl(logits_p: Float[Array, "*B V"], logits_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(p || q) of two categorical distributions given by logits.

    sum_v p(v) (log p(v) - log q(v)). A term with p(v) = 0 (a logit of -inf) is 0.

    Args:
      logits_p, logits_q: [*B, V], unnormalised log-probs in nats.

    Returns:
      float32 [*B], nats; one value per token. Sum over a response's tokens for its KL.

    Raises:
      AssertionError: shapes or types do not fit.
    """
    log_p, log_q = (jax.nn.log_softmax(logits) for logits in as_float32(logits_p=logits_p, logits_q=logits_q))
    possible = log_p > -jnp.inf
    # A double where: inf - inf must not reach the gradient.
    log_p = jnp.where(possible, log_p, 0.0)
    return jnp.sum(jnp.exp(log_p) * (log_p - jnp.where(possible, log_q, 0.0)), axis=-1)


def entropy(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Entropy of a categorical distribution given by logits.

    -sum_v p(v) log p(v). A term with p(v) = 0 (a logit of -inf) is 0.

    Args:
      logits: [*B, V], unnormalised log-probs in nats.

    Returns:
      float32 [*B], nats; one value per token.

    Raises:
      AssertionError: the type does not fit.
    """
    (logits,) = as_float32(logits=logits)
    log_p = jax.nn.log_softmax(logits)
    # Where p(v) = 0, log p(v) is replaced by 0: the term and its gradient are then 0.
    log_p = jnp.where(log_p > -jnp.inf, log_p, 0.0)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def geometric_mixture(
    logits: Float[Array, "*B V"], ref_logits: Float[Array, "*B V"], *, mixture: float = 0.125
) -> Float[Array, "*B V"]:
    """The opponent of Nash-MD and IPO-MD: pi^(1 - b) ref^b, normalised for each token.

    log_softmax((1 - b) log pi + b log ref). A policy of weight 0 does not count, even where its logit is -inf.

    arXiv 2312.00886 (which also normalises each token's distribution), 2403.08635.

    Args:
      logits: [*B, V], the policy's logits, in nats.
      ref_logits: [*B, V], the reference's logits.
      mixture: b in [0, 1]; 0 gives the policy (self-play), 1 the reference.

    Returns:
      float32 [*B, V], log-probs to sample from.

    Raises:
      ValueError: mixture is outside [0, 1].
      AssertionError: shapes or types do not fit.
    """
    if not 0.0 <= mixture <= 1.0:
        raise ValueError(f"mixture must be in [0, 1], got {mixture}")
    log_pi, log_ref = (jax.nn.log_softmax(each) for each in as_float32(logits=logits, ref_logits=ref_logits))
    # 0 times -inf is not a number.
    if mixture in (0.0, 1.0):
        return log_ref if mixture else log_pi
    return jax.nn.log_softmax((1.0 - mixture) * log_pi + mixture * log_ref)
