"""Shared parts of the pairwise losses: log-ratios, and the expectation over the label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from alignment_gap.losses._checks import OverTokens, as_counts, as_float32, as_preference, check_choice
from alignment_gap.losses._shapes import Array, Float, Int

Pair = tuple[Float[Array, "*B"], Float[Array, "*B"]]


def log_ratios(
    chosen_logps: Float[Array, "*B"],
    rejected_logps: Float[Array, "*B"],
    ref_chosen_logps: Float[Array, "*B"],
    ref_rejected_logps: Float[Array, "*B"],
) -> Pair:
    """log pi / ref of the chosen and of the rejected response, in float32."""
    chosen, rejected, ref_chosen, ref_rejected = as_float32(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    return chosen - ref_chosen, rejected - ref_rejected


def over_tokens_of(
    pair: Pair,
    chosen_lengths: Int[Array, "*B"] | None,
    rejected_lengths: Int[Array, "*B"] | None,
    over_tokens: OverTokens,
) -> Pair:
    """Both sides unchanged ("sum"), or each divided by its own length ("mean")."""
    check_choice("over_tokens", over_tokens, ("sum", "mean"))
    if over_tokens == "sum":
        return pair
    chosen, rejected = pair
    return (
        chosen / as_counts(chosen_lengths, chosen.shape, "chosen_lengths"),
        rejected / as_counts(rejected_lengths, rejected.shape, "rejected_lengths"),
    )


def expected(
    loss: Callable[[Float[Array, "*B"]], Float[Array, "*B"]], margin: Float[Array, "*B"], preference: Any
) -> Float[Array, "*B"]:
    """The expected loss over the label: p loss(margin) + (1 - p) loss(-margin), where p is the preference."""
    if preference is None:
        return loss(margin)
    preference = as_preference(preference, margin.shape)
    return preference * loss(margin) + (1.0 - preference) * loss(-margin)


def expected_over_sides(
    loss: Callable[[Float[Array, "*B"], Float[Array, "*B"]], Float[Array, "*B"]], pair: Pair, preference: Any
) -> Float[Array, "*B"]:
    """As `expected`, for losses that need both sides: p loss(chosen, rejected) + (1 - p) loss(rejected, chosen)."""
    chosen, rejected = pair
    if preference is None:
        return loss(chosen, rejected)
    preference = as_preference(preference, chosen.shape)
    return preference * loss(chosen, rejected) + (1.0 - preference) * loss(rejected, chosen)


def as_pair(chosen_logps: Float[Array, "*B"], rejected_logps: Float[Array, "*B"]) -> Pair:
    """Checks shapes and types, and converts both sides to float32."""
    chosen, rejected = as_float32(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    return chosen, rejected


def excess_length(
    chosen_lengths: Int[Array, "*B"] | None, rejected_lengths: Int[Array, "*B"] | None, shape: tuple[int, ...]
) -> Float[Array, "*B"]:
    """How many tokens longer the chosen response is."""
    return as_counts(chosen_lengths, shape, "chosen_lengths") - as_counts(rejected_lengths, shape, "rejected_lengths")
