"""Losses on a recorded pair together with fresh samples for the same prompt."""

from __future__ import annotations

import math
from typing import Any

from alignment_gap.losses._checks import check_between
from alignment_gap.losses._pairwise import dpo
from alignment_gap.losses._registry import OWN_SAMPLES, register
from alignment_gap.losses._regularizers import online_kl
from alignment_gap.losses._shapes import Array, Float


@register(reads=(OWN_SAMPLES,))
def hypo(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
    fresh_logps: Float[Array, "*B K"],
    ref_fresh_logps: Float[Array, "*B K"],
    preference: Float[Array, "*B"] | float | None = None,
    *,
    beta: Any = 0.1,
    kl_weight: Any = 0.01,
) -> Float[Array, "*B"]:
    """HyPO: DPO on a recorded pair, plus the KL to the reference on fresh samples of the policy.

    -log sigma(beta h) + kl_weight KL. The KL is `online_kl` of the fresh samples: the mean over K of log pi / ref, with
    its true gradient.

    arXiv 2406.01462. The default of `kl_weight` is ours, not the paper's. When the policy equals the reference, DPO's
    slope in h is -beta / 2 = -0.05; a single fresh sample has an equal slope at a log-ratio of 5 nats. Sum over tokens.

    Args:
      chosen_logps, rejected_logps: [*B], token-summed log-probs under the policy, in nats.
      ref_chosen_logps, ref_rejected_logps: [*B], the same under the reference.
      fresh_logps: [*B, K], log-probs of samples that the current policy drew for the same prompt.
      ref_fresh_logps: [*B, K], the same under the reference.
      preference: [*B] or a number, the probability that the first response is the better; None means 1.
      beta: strength of DPO's KL regularisation, in rewards per nat.
      kl_weight: weight of the KL on fresh samples, in units of the loss per nat.

    Returns:
      float32 [*B].

    Raises:
      ValueError: a setting is out of range.
      AssertionError: shapes or types do not fit.
    """
    check_between(0.0, math.inf, kl_weight=kl_weight)
    contrast = dpo(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, preference, beta=beta)
    return contrast + kl_weight * online_kl(fresh_logps, ref_fresh_logps)
