"""Losses over K responses of one prompt that contrast no pair."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignment_gap.losses._checks import OverTokens, as_counts, as_float32, check_choice


def _over_tokens(
    logps: Float[Array, "*B K"], lengths: Int[Array, "*B K"] | None, over_tokens: OverTokens
) -> Float[Array, "*B K"]:
    check_choice("over_tokens", over_tokens, ("sum", "mean"))
    return logps if over_tokens == "sum" else logps / as_counts(lengths, logps.shape, "lengths")


def sft(
    logps: Float[Array, "*B K"], lengths: Int[Array, "*B K"] | None = None, *, over_tokens: OverTokens = "sum"
) -> Float[Array, "*B"]:
    """Supervised fine-tuning: the mean over the K responses of -log pi(y).

    Sum over tokens; `over_tokens="mean"` divides each response's log-prob by its length.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats.
      lengths: [*B, K], numbers of scored tokens; read only with `over_tokens="mean"`.
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range. AssertionError: shapes or types do not fit.
    """
    (logps,) = as_float32(logps)
    return -jnp.mean(_over_tokens(logps, lengths, over_tokens), axis=-1)


def best_of_n(
    logps: Float[Array, "*B K"],
    scores: Float[Array, "*B K"],
    lengths: Int[Array, "*B K"] | None = None,
    *,
    over_tokens: OverTokens = "sum",
) -> Float[Array, "*B"]:
    """Best of n: supervised fine-tuning on the winner, -log pi(y_k) with k = argmax scores.

    Responses that tie for the best share the loss equally. arXiv 2405.08448 (Bo2, K = 2). Sum over tokens;
    `over_tokens="mean"` divides each response's log-prob by its length.

    Args:
      logps: [*B, K], token-summed log-probs under the policy, in nats.
      scores: [*B, K], the higher the better; only their order counts.
      lengths: [*B, K], numbers of scored tokens; read only with `over_tokens="mean"`.
      over_tokens: "sum" or "mean".

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range. AssertionError: shapes or types do not fit.
    """
    logps, scores = as_float32(logps, scores)
    logps = _over_tokens(logps, lengths, over_tokens)
    return -jnp.mean(logps, axis=-1, where=scores == jnp.max(scores, axis=-1, keepdims=True))
