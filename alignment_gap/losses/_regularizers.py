"""Divergence from the reference and entropy: estimators from samples, and exact over a vocabulary."""

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

    With x = log pi - log ref: k1 = x, unbiased; k2 = x^2 / 2, biased, of low variance;
    k3 = exp(-x) - 1 + x, unbiased, never negative, continued by its tangent below x = -60.

    Schulman 2020, "Approximating KL divergence". Beware of the gradients, all at samples that are held fixed: that of
    k1 is zero in expectation, that of k2 is KL(pi || ref)'s, that of k3 is KL(ref || pi)'s, though its value is that
    of KL(pi || ref). For a regulariser use k2, `online_kl` or the exact sum.

    Args:
      logps: log-probs under the policy of what it sampled, in nats: [*B] of responses, or [*B, T] of tokens.
      ref_logps: the same under the reference.
      estimator: "k1", "k2" or "k3".

    Returns:
      float32 [*B], nats; per response or token, as given, nothing summed.

    Raises:
      ValueError: no such estimator. AssertionError: shapes or types do not fit.
    """
    check_choice("estimator", estimator, ("k1", "k2", "k3"))
    logps, ref_logps = as_float32(logps, ref_logps)
    x = logps - ref_logps
    if estimator == "k1":
        return x
    return 0.5 * jnp.square(x) if estimator == "k2" else tangent_expm1(-x) + x


@register(reads=(OWN_SAMPLES,))
def online_kl(logps: Float[Array, "*B K"], ref_logps: Float[Array, "*B K"]) -> Float[Array, "*B"]:
    """KL(pi || ref) at the policy's own samples, with its true gradient.

    Value: the mean over K of x = log pi / ref. Gradient: the mean over K of (x_k - b_k) grad log pi(y_k), b_k the mean
    of x over the other responses, 0 where K is 1.

    arXiv 2406.01462, which adds it to DPO (see `hypo`). Sum over tokens.

    Args:
      logps: [*B, K], token-summed log-probs of the policy's own samples, in nats.
      ref_logps: [*B, K], the same under the reference.

    Returns:
      float32 [*B], nats.

    Raises:
      AssertionError: shapes or types do not fit.
    """
    logps, ref_logps = as_float32(logps, ref_logps)
    ratios = lax.stop_gradient(logps - ref_logps)
    size = logps.shape[-1]
    weights = ratios if size == 1 else (ratios - jnp.mean(ratios, axis=-1, keepdims=True)) * (size / (size - 1))
    # The second factor is zero in value: it carries the gradient alone.
    return jnp.mean(ratios + weights * (logps - lax.stop_gradient(logps)), axis=-1)


def categorical_kl(logits_p: Float[Array, "*B V"], logits_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """KL(p || q) of two categorical distributions given by logits.

    sum_v p(v) (log p(v) - log q(v)); where p(v) = 0 (a logit of -inf) the term is 0.

    Args:
      logits_p, logits_q: [*B, V], unnormalised log-probs in nats.

    Returns:
      float32 [*B], nats; one value per token. Sum them over a response's tokens for its KL.

    Raises:
      AssertionError: shapes or types do not fit.
    """
    log_p, log_q = (jax.nn.log_softmax(logits) for logits in as_float32(logits_p, logits_q))
    possible = log_p > -jnp.inf
    # A double where: inf - inf must not reach the gradient.
    log_p = jnp.where(possible, log_p, 0.0)
    return jnp.sum(jnp.exp(log_p) * (log_p - jnp.where(possible, log_q, 0.0)), axis=-1)


def entropy(logits: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Entropy of a categorical distribution given by logits.

    -sum_v p(v) log p(v); where p(v) = 0 (a logit of -inf) the term is 0.

    Args:
      logits: [*B, V], unnormalised log-probs in nats.

    Returns:
      float32 [*B], nats; one value per token.

    Raises:
      AssertionError: the type does not fit.
    """
    (logits,) = as_float32(logits)
    log_p = jax.nn.log_softmax(logits)
    # Where p(v) = 0, the 0 in place of log p(v) makes the term vanish, and its gradient.
    log_p = jnp.where(log_p > -jnp.inf, log_p, 0.0)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def geometric_mixture(
    logits: Float[Array, "*B V"], ref_logits: Float[Array, "*B V"], *, mixture: float = 0.125
) -> Float[Array, "*B V"]:
    """The opponent of Nash-MD and IPO-MD, token by token: pi^(1 - b) ref^b, normalised.

    log_softmax((1 - b) log pi + b log ref).

    arXiv 2312.00886 (which normalises each token's distribution, as here), 2403.08635.

    Args:
      logits: [*B, V], the policy's, in nats.
      ref_logits: [*B, V], the reference's.
      mixture: b in [0, 1]; 0 is the policy (self-play), 1 the reference.

    Returns:
      float32 [*B, V], log-probs to sample from.

    Raises:
      ValueError: mixture is outside [0, 1]. AssertionError: shapes or types do not fit.
    """
    if not 0.0 <= mixture <= 1.0:
        raise ValueError(f"mixture must be in [0, 1], got {mixture}")
    log_pi, log_ref = (jax.nn.log_softmax(each) for each in as_float32(logits, ref_logits))
    return jax.nn.log_softmax((1.0 - mixture) * log_pi + mixture * log_ref)
