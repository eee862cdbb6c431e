"""Contrastive losses that need the log-probs of single tokens: LD-DPO and WPO."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax

from alignment_gap.losses._checks import as_float32, as_mask, check_between, check_choice
from alignment_gap.losses._numerics import masked_mean, masked_sum, tangent_exp
from alignment_gap.losses._pairwise import dpo
from alignment_gap.losses._registry import LOG_COLLISIONS, register
from alignment_gap.losses._shapes import Array, Bool, Float


@register()
def ld_dpo(
    chosen_token_logps: Float[Array, "*B T"],
    rejected_token_logps: Float[Array, "*B S"],
    ref_chosen_token_logps: Float[Array, "*B T"],
    ref_rejected_token_logps: Float[Array, "*B S"],
    chosen_mask: Bool[Array, "*B T"],
    rejected_mask: Bool[Array, "*B S"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
    alpha: float = 0.5,
) -> Float[Array, "*B"]:
    """LD-DPO: DPO with a smaller weight on the tokens by which one response is longer.

    `dpo` on the sum over t <= n of log pi(y_t) plus alpha times the sum over t > n, n = min(|y_w|, |y_l|). The
    reference's log-probs are weighted in the same way.

    arXiv 2409.06411. Sum over tokens. alpha = 1 gives `dpo`; alpha = 0 ignores the excess tokens.

    Args:
      chosen_token_logps, rejected_token_logps: `[*B, T]`, `[*B, S]`, log-probs of the tokens under the policy, in nats.
      ref_chosen_token_logps, ref_rejected_token_logps: the same under the reference.
      chosen_mask, rejected_mask: true at scored tokens; t counts scored tokens only.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of the KL regularisation, in rewards per nat.
      alpha: weight of the excess tokens, in [0, 1].

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_between(0.0, 1.0, alpha=alpha)
    chosen = as_float32(chosen_token_logps=chosen_token_logps, ref_chosen_token_logps=ref_chosen_token_logps)
    rejected = as_float32(rejected_token_logps=rejected_token_logps, ref_rejected_token_logps=ref_rejected_token_logps)
    masks = (
        as_mask(chosen_mask, chosen[0].shape, "chosen_mask"),
        as_mask(rejected_mask, rejected[0].shape, "rejected_mask"),
    )
    shared = jnp.minimum(*(jnp.sum(mask, axis=-1, keepdims=True) for mask in masks))

    def total(logps: Float[Array, "*B T"], mask: Bool[Array, "*B T"]) -> Float[Array, "*B"]:
        weights = jnp.where(jnp.cumsum(mask, axis=-1) <= shared, 1.0, alpha)
        return masked_sum(jnp.where(mask, logps, 0.0) * weights, mask)

    (policy_w, ref_w), (policy_l, ref_l) = (
        tuple(total(logps, mask) for logps in side) for side, mask in zip((chosen, rejected), masks, strict=True)
    )
    return dpo(policy_w, policy_l, ref_w, ref_l, preference, beta=beta)


@register(reads=lambda settings: (LOG_COLLISIONS,) if settings["alignment"] == "sampled" else ())
def wpo(
    chosen_token_logps: Float[Array, "*B T"],
    rejected_token_logps: Float[Array, "*B S"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    chosen_mask: Bool[Array, "*B T"],
    rejected_mask: Bool[Array, "*B S"],
    preference: Float[Array, "*B"] | float | None = None,
    chosen_log_collisions: Float[Array, "*B T"] | None = None,
    rejected_log_collisions: Float[Array, "*B S"] | None = None,
    *,
    beta: Any = 0.1,
    alignment: Literal["plain", "sampled"] = "plain",
) -> Float[Array, "*B"]:
    """WPO: DPO weighted by how likely the policy is to produce the pair.

    omega(y_w) omega(y_l) dpo, where omega(y) = exp(mean over tokens of log pi(y_t) - c_t), without gradient. c_t is 0;
    with `alignment="sampled"` it is log sum_v pi(v)^2 (see `token_log_collision`).

    arXiv 2406.11827. The loss sums over tokens; the weights take the mean. `wpo_weights` gives the weights alone.

    Args:
      chosen_token_logps, rejected_token_logps: `[*B, T]`, `[*B, S]`, log-probs of the tokens under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], token-summed log-probs under the reference.
      chosen_mask, rejected_mask: true at scored tokens.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      chosen_log_collisions, rejected_log_collisions: log sum_v pi(v)^2 at every token, in nats; used only with
        `alignment="sampled"`.
      beta: strength of the KL regularisation, in rewards per nat.
      alignment: "plain", or "sampled" for the paper's sampled alignment.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_choice("alignment", alignment, ("plain", "sampled"))
    if alignment == "plain":
        chosen_log_collisions = rejected_log_collisions = None
    elif chosen_log_collisions is None or rejected_log_collisions is None:
        raise ValueError('chosen_log_collisions and rejected_log_collisions are needed with alignment="sampled"')
    log_weights = _log_weights(chosen_token_logps, chosen_mask, chosen_log_collisions, "chosen_")
    log_weights += _log_weights(rejected_token_logps, rejected_mask, rejected_log_collisions, "rejected_")
    (chosen,), (rejected,) = (
        as_float32(chosen_token_logps=chosen_token_logps),
        as_float32(rejected_token_logps=rejected_token_logps),
    )
    chosen, rejected = masked_sum(chosen, chosen_mask), masked_sum(rejected, rejected_mask)
    ref_chosen, ref_rejected = as_float32(ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps)
    return tangent_exp(log_weights) * dpo(chosen, rejected, ref_chosen, ref_rejected, preference, beta=beta)


def wpo_weights(
    token_logps: Float[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    log_collisions: Float[Array, "*B T"] | None = None,
) -> Float[Array, "*B"]:
    """WPO's weight of a response, as a factor for any loss.

    exp(mean over tokens of log pi(y_t) - c_t), without gradient; c_t is as in `wpo`.

    arXiv 2406.11827. Mean over tokens.

    Args:
      token_logps: [*B, T], log-probs of the tokens under the policy, in nats.
      mask: [*B, T], true at scored tokens.
      log_collisions: [*B, T], log sum_v pi(v)^2 at every token, in nats, or None.

    Returns:
      float32 [*B]; at most 1 if `log_collisions` is None.

    Raises:
      AssertionError: shapes or types do not fit.
    """
    return tangent_exp(_log_weights(token_logps, mask, log_collisions))


def _log_weights(token_logps: Array, mask: Array, log_collisions: Array | None, side: str = "") -> Float[Array, "*B"]:
    """The logarithm of `wpo_weights`; `side` begins the arguments' names in errors."""
    (logps,) = as_float32(**{f"{side}token_logps": token_logps})
    if log_collisions is not None:
        both = {f"{side}token_logps": token_logps, f"{side}log_collisions": log_collisions}
        logps, log_collisions = as_float32(**both)
        logps = logps - log_collisions
    return lax.stop_gradient(masked_mean(logps, as_mask(mask, logps.shape, f"{side}mask")))
