"""Weighted sums of losses."""

from __future__ import annotations

import inspect
import math
from typing import Any

import chex

from alignment_gap.losses._registry import Loss, arrays, get, reads


def combine(*terms: tuple[Any, str | Loss]) -> Loss:
    """A weighted sum of losses, which is itself a loss.

    sum_i weight_i loss_i(...). Each loss gets only the arrays that it names.

    Args:
      *terms: pairs (weight, loss). A loss is a name, "module:function", a configured loss, or any callable whose
        parameters name arrays. All terms must return the same shape.

    Returns:
      A loss with the parameters of all terms, required parameters first. It reads what any term reads.

    Raises:
      ValueError: there are no terms, a term is not a pair, a weight is not a finite number, or the name of a loss is
        unknown. The combined loss raises AssertionError if its terms return different shapes.
    """
    if not terms:
        raise ValueError("combine needs at least one (weight, loss) pair")
    if wrong := [term for term in terms if isinstance(term, str) or not hasattr(term, "__len__") or len(term) != 2]:
        raise ValueError(f"combine takes pairs (weight, loss), one after the other, got {wrong[0]!r}")
    for weight, _ in terms:
        _check_weight(weight)
    losses = [(weight, get(loss)) for weight, loss in terms]
    named = [arrays(loss) for _, loss in losses]
    signature = _union([loss for _, loss in losses])

    def combined(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        values = [
            weight * loss(**{name: given[name] for name in names if name in given})
            for (weight, loss), names in zip(losses, named, strict=True)
        ]
        chex.assert_equal_shape(values)
        return sum(values)

    combined.__signature__ = signature  # type: ignore[attr-defined]
    combined.reads = frozenset().union(*(reads(loss) for _, loss in losses))  # type: ignore[attr-defined]
    return combined


def _check_weight(weight: Any) -> None:
    """Refuses what is no finite number; arrays, and traced values, are not checked."""
    if hasattr(weight, "dtype"):
        return
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"combine: a weight must be a finite number, got {weight!r}")


def _union(losses: list[Loss]) -> inspect.Signature:
    """A signature with the arrays of all losses; an array is required if any loss requires it."""
    union: dict[str, inspect.Parameter] = {}
    for loss in losses:
        for name in arrays(loss):
            parameter = inspect.signature(loss).parameters[name]
            if name not in union or parameter.default is parameter.empty:
                union[name] = parameter
    required = [each for each in union.values() if each.default is each.empty]
    return inspect.Signature([*required, *(each for each in union.values() if each.default is not each.empty)])
