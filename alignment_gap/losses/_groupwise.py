"""Losses over the K responses to one prompt, without a policy gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alignment_gap.losses._checks import OverTokens, as_counts, as_float32, check_choice, check_group, check_positive
from alignment_gap.losses._registry import register
from alignment_gap.losses._shapes import Array, Float, Int


def _over_tokens(
    logps: Float[Array, "*B K"], lengths: Int[Array, "*B K"] | None, over_tokens: OverTokens
) -> Float[Array, "*B K"]:
    check_choice("over_tokens", over_tokens, ("sum", "mean"))
    return logps if over_tokens == "sum" else logps / as_counts(lengths, logps.shape, "lengths")


@register()
def sft(
    logps: Float[Array, "*B K"], lengths: Int[Array, "*B K"] | None = None, *, over_tokens: OverTokens = "sum"
) -> Float[Array, "*B"]:
    """Supervised fine-tuning: the mean over the K responses of -log pi(y).

    Sum over tokens; `over_tokens="mean"` divides each response's log-prob by its length.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats.
      lengths: [*B, K], numbers of scored tokens; used only with `over_tokens="mean"`.
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    (logps,) = as_float32(logps=logps)
    return -jnp.mean(_over_tokens(logps, lengths, over_tokens), axis=-1)


@register()
def best_of_n(
    logps: Float[Array, "*B K"],
    scores: Float[Array, "*B K"],
    lengths: Int[Array, "*B K"] | None = None,
    *,
    over_tokens: OverTokens = "sum",
) -> Float[Array, "*B"]:
    """Best of n: supervised fine-tuning on the best response, -log pi(y_k) with k = argmax scores.

    If several responses tie for the best score, the loss is their mean. arXiv 2405.08448 (Bo2, K = 2). Sum over tokens;
    `over_tokens="mean"` divides each response's log-prob by its length.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats.
      scores: [*B, K], higher is better; only their order matters.
      lengths: [*B, K], numbers of scored tokens; used only with `over_tokens="mean"`.
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    logps, scores = as_float32(logps=logps, scores=scores)
    logps = _over_tokens(logps, lengths, over_tokens)
    return -jnp.mean(logps, axis=-1, where=scores == jnp.max(scores, axis=-1, keepdims=True))


@register()
def raft(logps: Float[Array, "*B K"], scores: Float[Array, "*B K"], *, keep: int = 1) -> Float[Array, "*B"]:
    """Reward-ranked fine-tuning: the mean of -log pi(y) over the `keep` best of the K responses.

    If scores tie, the earlier response is kept. `keep=1` equals `best_of_n` except on ties. arXiv 2304.06767.
    Sum over tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats.
      scores: [*B, K], higher is better; only their order matters.
      keep: number of responses to keep, from 1 to K.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    logps, scores = as_float32(logps=logps, scores=scores)
    if not 1 <= keep <= logps.shape[-1]:
        raise ValueError(f"keep must be between 1 and the {logps.shape[-1]} responses, got {keep}")
    _, best = lax.top_k(scores, keep)
    return -jnp.mean(jnp.take_along_axis(logps, best, axis=-1), axis=-1)


@register(aliases={"rwr": {}})
def reward_weighted_regression(
    logps: Float[Array, "*B K"], scores: Float[Array, "*B K"], *, temperature: Any = 1.0
) -> Float[Array, "*B"]:
    """Reward-weighted regression: supervised loss on all K responses, weighted by their exponentiated scores.

    -sum_k softmax(scores / temperature)_k log pi(y_k).

    Peters and Schaal 2007; arXiv 1910.00177 for the form with exponentiated advantages. As the temperature goes to
    infinity the loss becomes `sft`, as it goes to 0 `best_of_n`. Sum over tokens; for the mean, pass log-probs divided
    by their lengths.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats.
      scores: [*B, K], rewards.
      temperature: temperature of the softmax, in units of the rewards.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(temperature=temperature)
    logps, scores = as_float32(logps=logps, scores=scores)
    return -jnp.sum(jax.nn.softmax(lax.stop_gradient(scores) / temperature) * logps, axis=-1)


@register()
def rebel(
    logps: Float[Array, "*B K"], ref_logps: Float[Array, "*B K"], scores: Float[Array, "*B K"], *, beta: Any = 0.1
) -> Float[Array, "*B"]:
    """REBEL: regression of log-ratios on rewards, up to a constant for each prompt.

    The mean over pairs j < k of (beta (r_j - r_k) - (s_j - s_k))^2, r = log pi / ref; K = 2 gives the paper's loss.

    arXiv 2404.16767, whose eta is 1 / beta and whose reference is the policy of the previous iteration. Sum over
    tokens; for the mean, pass log-probs divided by their lengths.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats; K is at least 2.
      ref_logps: [*B, K], the same under the reference.
      scores: [*B, K], rewards.
      beta: strength of the KL regularisation, in rewards per nat.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_positive(beta=beta)
    logps, ref_logps, scores = as_float32(logps=logps, ref_logps=ref_logps, scores=scores)
    check_group(logps)
    # The mean of squared differences over pairs is twice the sample variance.
    return 2.0 * jnp.var(beta * (logps - ref_logps) - scores, axis=-1, ddof=1)
