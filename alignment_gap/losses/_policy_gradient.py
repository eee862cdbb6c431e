"""Policy-gradient losses over K responses to one prompt, sampled from the policy.

The values are surrogates: only their gradient has a meaning. No gradient passes through scores, baselines or
advantages. Samples of another policy:

- losses that read `SAMPLER_LOG_PROBS` are correct, given the log-probs under that policy;
- losses that read `OWN_SAMPLES` are wrong.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import chex
import jax.numpy as jnp
from jax import lax

from alignment_gap.losses._checks import as_float32, as_mask, check_between, check_choice, check_group
from alignment_gap.losses._numerics import masked_mean, masked_sum, tangent_exp
from alignment_gap.losses._registry import OWN_SAMPLES, PROBABILITIES, SAMPLER_LOG_PROBS, WIDTH, register
from alignment_gap.losses._regularizers import kl_estimate
from alignment_gap.losses._shapes import Array, Bool, Float

OverGroupTokens = Literal["mean", "sum", "group"]


@register(reads=(OWN_SAMPLES,))
def reinforce(
    logps: Float[Array, "*B K"],
    scores: Float[Array, "*B K"],
    ref_logps: Float[Array, "*B K"] | None = None,
    *,
    beta: Any = 0.0,
    baseline: float | None = None,
) -> Float[Array, "*B"]:
    """REINFORCE with a baseline: the mean over K of -(R - b) log pi(y).

    R = score - beta log pi / ref; b is the given baseline, or the mean of R over the K responses. That mean scales the
    gradient by (K - 1) / K; `rloo` avoids this. The responses must be samples of the current policy.

    Williams 1992; arXiv 2402.14740. Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats.
      scores: [*B, K], rewards.
      ref_logps: [*B, K], log-probs under the reference; needed if beta is not 0.
      beta: strength of the KL penalty, in rewards per nat.
      baseline: b, in rewards; None takes the group's mean.

    Returns:
      float32 [*B].

    Raises:
      ValueError: the reference is missing, beta is out of range, or K is 1 without a given baseline.
      AssertionError: shapes or types do not fit.
    """
    logps, rewards = _penalized(logps, scores, ref_logps, beta)
    if baseline is None:
        check_group(logps)
    return _score_function(logps, _centred(rewards) if baseline is None else rewards - baseline)


@register(reads=(SAMPLER_LOG_PROBS,))
def rloo(
    logps: Float[Array, "*B K"],
    scores: Float[Array, "*B K"],
    ref_logps: Float[Array, "*B K"] | None = None,
    old_logps: Float[Array, "*B K"] | None = None,
    *,
    beta: Any = 0.0,
    clip: float | None = None,
) -> Float[Array, "*B"]:
    """REINFORCE, leave one out: the baseline of a response is the mean reward of the others.

    The mean over K of -A_k log pi(y_k), A_k = R_k - mean of R_j over j != k, R = score - beta log pi / ref.
    With `old_logps`: the mean over K of -q A, where q = pi / pi_old of the whole response. With `clip` too: the mean of
    -min(q A, clip(q, 1 - clip, 1 + clip) A). At q = 1 all three have the same gradient.

    arXiv 2402.14740; the clipped ratio: arXiv 1707.06347. Sum over tokens; for the mean, pass log-probs divided by
    their lengths.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats; K is at least 2.
      scores: [*B, K], rewards.
      ref_logps: [*B, K], log-probs under the reference; needed if beta is not 0.
      old_logps: [*B, K], log-probs under the policy that sampled; None if that is the policy itself.
      beta: strength of the KL penalty, in rewards per nat.
      clip: how far q may fall below 1 or rise above it; None sets no bound. Used only with `old_logps`.

    Returns:
      float32 [*B].

    Raises:
      ValueError: the reference is missing, a setting is out of range, or K is 1.
      AssertionError: shapes or types do not fit.
    """
    logps, rewards = _penalized(logps, scores, ref_logps, beta)
    check_group(logps)
    if clip is not None:
        check_between(0.0, 1.0, clip=clip)
    size = logps.shape[-1]
    advantages = _centred(rewards) * (size / (size - 1))
    if old_logps is None:
        return _score_function(logps, advantages)
    logps, old_logps = as_float32(logps=logps, old_logps=old_logps)
    return jnp.mean(_surrogate(logps - lax.stop_gradient(old_logps), advantages, clip, clip), axis=-1)


@register(reads=(OWN_SAMPLES, PROBABILITIES))
def nash_md(
    logps: Float[Array, "*B K"], ref_logps: Float[Array, "*B K"], scores: Float[Array, "*B K"], *, beta: Any = 0.1
) -> Float[Array, "*B"]:
    """Nash-MD's policy gradient: win against an opponent sampled from the mixture of policy and reference.

    The mean over K of -(s - 1/2 - beta log pi / ref) log pi(y), where s is the probability that y beats a sample of
    pi^(1 - b) ref^b (see `geometric_mixture`).

    arXiv 2312.00886, whose tau is beta here. The responses must be samples of the current policy. Sum over tokens.

    Args:
      logps: [*B, K], token-summed log-probs of the policy's own samples, in nats.
      ref_logps: [*B, K], the same under the reference.
      scores: [*B, K], probability that the response is preferred to its opponent.
      beta: strength of the KL regularisation, in preferences per nat.

    Returns:
      float32 [*B].

    Raises:
      ValueError: beta is out of range.
      AssertionError: shapes or types do not fit.
    """
    logps, advantages = _penalized(logps, scores, ref_logps, beta)
    return _score_function(logps, advantages - 0.5)


@register(aliases={"dapo": {"over_tokens": "group", "clip_high": 0.28, "beta": 0.0}}, reads=(SAMPLER_LOG_PROBS,))
def grpo(
    token_logps: Float[Array, "*B K T"],
    scores: Float[Array, "*B K"],
    mask: Bool[Array, "*B K T"],
    old_token_logps: Float[Array, "*B K T"] | None = None,
    ref_token_logps: Float[Array, "*B K T"] | None = None,
    *,
    beta: Any = 0.04,
    clip: float = 0.2,
    clip_high: float | None = None,
    over_tokens: OverGroupTokens = "mean",
) -> Float[Array, "*B"]:
    """Group relative policy optimisation.

    Per token -min(q A, clip(q, 1 - clip, 1 + clip_high) A) + beta k3, q = pi / pi_old,
    A = (s - mean s) / (std s + 1e-4) over the K responses (sample standard deviation), k3 as in `kl_estimate`.

    arXiv 2402.03300. Mean over each response's tokens, then over K. `over_tokens="group"` takes the mean over all
    tokens of the K responses (DAPO, arXiv 2503.14476); "sum" takes the sum over tokens, then the mean over K. `dr_grpo`
    changes the advantages too.

    Args:
      token_logps: [*B, K, T], log-probs of the tokens under the policy, in nats; K is at least 2.
      scores: [*B, K], rewards.
      mask: [*B, K, T], true at scored tokens.
      old_token_logps: [*B, K, T], log-probs under the policy that sampled; None uses the policy itself, so q = 1.
      ref_token_logps: [*B, K, T], log-probs under the reference; needed if beta is not 0.
      beta: weight of the KL estimate, in rewards per nat.
      clip, clip_high: how far q may fall below 1 and rise above it; if `clip_high` is None, `clip` is used for both.
      over_tokens: "mean", "group" or "sum".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range, or K is 1.
      AssertionError: shapes or types do not fit.
    """
    check_choice("over_tokens", over_tokens, ("mean", "sum", "group"))
    (scores,) = as_float32(scores=scores)
    check_group(scores)
    centred = _centred(scores)
    advantages = centred / (jnp.std(centred, axis=-1, ddof=1, keepdims=True) + 1e-4)
    per_token = _clipped(token_logps, advantages[..., None], mask, old_token_logps, clip, clip_high)
    per_token += _penalty(token_logps, ref_token_logps, mask, beta)
    if over_tokens == "group":
        return masked_mean(per_token.reshape(*per_token.shape[:-2], -1), mask.reshape(*mask.shape[:-2], -1))
    aggregate = masked_mean if over_tokens == "mean" else masked_sum
    return jnp.mean(aggregate(per_token, mask), axis=-1)


@register(reads=lambda settings: (SAMPLER_LOG_PROBS,) if settings["max_length"] else (SAMPLER_LOG_PROBS, WIDTH))
def dr_grpo(
    token_logps: Float[Array, "*B K T"],
    scores: Float[Array, "*B K"],
    mask: Bool[Array, "*B K T"],
    old_token_logps: Float[Array, "*B K T"] | None = None,
    ref_token_logps: Float[Array, "*B K T"] | None = None,
    *,
    beta: Any = 0.0,
    clip: float = 0.2,
    clip_high: float | None = None,
    max_length: int | None = None,
) -> Float[Array, "*B"]:
    """GRPO done right: no division by the standard deviation or by the response's own length.

    The terms of `grpo` with A = s - mean s, summed over tokens and divided by the constant `max_length`; mean over K.

    arXiv 2503.20783. `max_length=1` gives the sum over tokens.

    Args:
      token_logps: [*B, K, T], log-probs of the tokens under the policy, in nats; K is at least 2.
      scores: [*B, K], rewards.
      mask: [*B, K, T], true at scored tokens.
      old_token_logps: [*B, K, T], log-probs under the policy that sampled; None uses the policy itself.
      ref_token_logps: [*B, K, T], log-probs under the reference; needed if beta is not 0.
      beta: weight of the KL estimate, in rewards per nat.
      clip, clip_high: how far the ratio may fall below 1 and rise above it; if `clip_high` is None, `clip` is used for
        both.
      max_length: the constant divisor; None uses T.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range, or K is 1.
      AssertionError: shapes or types do not fit.
    """
    (scores,) = as_float32(scores=scores)
    check_group(scores)
    if max_length is not None:
        check_between(1, math.inf, max_length=max_length)
    per_token = _clipped(token_logps, _centred(scores)[..., None], mask, old_token_logps, clip, clip_high)
    per_token += _penalty(token_logps, ref_token_logps, mask, beta)
    return jnp.mean(masked_sum(per_token, mask), axis=-1) / (max_length or mask.shape[-1])


@register(reads=(SAMPLER_LOG_PROBS,))
def ppo_clip(
    token_logps: Float[Array, "*B K T"],
    scores: Float[Array, "*B K"],
    mask: Bool[Array, "*B K T"],
    old_token_logps: Float[Array, "*B K T"] | None = None,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Float[Array, "*B"]:
    """Proximal policy optimisation's clipped surrogate.

    Per token -min(q A, clip(q, 1 - clip, 1 + clip_high) A), q = pi / pi_old, A = s - mean s over the K responses.

    arXiv 1707.06347. Mean over each response's tokens, then over K; for the sum, multiply by the lengths.

    Args:
      token_logps: [*B, K, T], log-probs of the tokens under the policy, in nats; K is at least 2.
      scores: [*B, K], rewards.
      mask: [*B, K, T], true at scored tokens.
      old_token_logps: [*B, K, T], log-probs under the policy that sampled; None uses the policy itself, so q = 1.
      clip, clip_high: how far q may fall below 1 and rise above it; if `clip_high` is None, `clip` is used for both.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range, or K is 1.
      AssertionError: shapes or types do not fit.
    """
    (scores,) = as_float32(scores=scores)
    check_group(scores)
    per_token = _clipped(token_logps, _centred(scores)[..., None], mask, old_token_logps, clip, clip_high)
    return jnp.mean(masked_mean(per_token, mask), axis=-1)


def _penalized(logps: Array, scores: Array, ref_logps: Array | None, beta: Any) -> tuple[Array, Array]:
    """The log-probs, and the scores minus each sample's KL penalty, both in float32."""
    check_between(0.0, math.inf, beta=beta)
    if ref_logps is None:
        if not isinstance(beta, int | float) or beta != 0:
            raise ValueError("ref_logps is needed where beta is not 0")
        logps, scores = as_float32(logps=logps, scores=scores)
        return logps, scores
    logps, scores, ref_logps = as_float32(logps=logps, scores=scores, ref_logps=ref_logps)
    return logps, scores - beta * (logps - ref_logps)


def _centred(scores: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """The scores minus the mean of their group; exactly 0 where all scores of a group are equal.

    The mean of equal scores may differ from them by its rounding, which `grpo` would divide by 1e-4. So the first score
    is subtracted before the mean.
    """
    apart = scores - scores[..., :1]
    return apart - jnp.mean(apart, axis=-1, keepdims=True)


def _score_function(logps: Array, advantages: Array) -> Float[Array, "*B"]:
    return -jnp.mean(lax.stop_gradient(advantages) * logps, axis=-1)


def _clipped(
    token_logps: Array,
    advantages: Array,
    mask: Array,
    old_token_logps: Array | None,
    clip: float,
    clip_high: float | None,
) -> Float[Array, "*B K T"]:
    """The clipped surrogate of every token; the advantages are broadcast over tokens."""
    check_between(0.0, 1.0, clip=clip)
    if clip_high is not None:
        check_between(0.0, math.inf, clip_high=clip_high)
    if old_token_logps is None:
        old_token_logps = token_logps
    token_logps, old_token_logps = as_float32(token_logps=token_logps, old_token_logps=old_token_logps)
    mask = as_mask(mask, token_logps.shape)
    chex.assert_shape(advantages, (*token_logps.shape[:-1], 1))
    # The mask comes before the exponential, so that values at padding affect neither the result nor the gradient.
    log_ratios = jnp.where(mask, token_logps - lax.stop_gradient(old_token_logps), 0.0)
    return _surrogate(log_ratios, advantages, clip, clip if clip_high is None else clip_high)


def _surrogate(
    log_ratios: Array, advantages: Array, clip_low: float | None, clip_high: float | None
) -> Float[Array, "*B"]:
    """-min(q A, clip(q, 1 - clip_low, 1 + clip_high) A), q = exp(log_ratios); -q A if a bound is None."""
    ratios, advantages = tangent_exp(log_ratios), lax.stop_gradient(advantages)
    if clip_low is None or clip_high is None:
        return -ratios * advantages
    return -jnp.minimum(ratios * advantages, jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high) * advantages)


def _penalty(token_logps: Array, ref_token_logps: Array | None, mask: Array, beta: Any) -> Array:
    """beta times the k3 estimate of every token."""
    check_between(0.0, math.inf, beta=beta)
    if isinstance(beta, int | float) and beta == 0:
        return jnp.zeros(token_logps.shape, jnp.float32)
    if ref_token_logps is None:
        raise ValueError("ref_token_logps is needed where beta is not 0")
    token_logps, ref_token_logps = as_float32(token_logps=token_logps, ref_token_logps=ref_token_logps)
    return beta * kl_estimate(jnp.where(mask, token_logps, 0.0), jnp.where(mask, ref_token_logps, 0.0))
