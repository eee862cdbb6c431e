"""Checks and conversions that open every loss."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from alignment_gap.losses._shapes import Array, Bool, Float, Int

OverTokens = Literal["sum", "mean"]


_KINDS = {"floating": jnp.floating, "integer": jnp.integer, "boolean": jnp.bool_}


def as_float32(**arrays: Any) -> tuple[Float[Array, "*B"], ...]:
    """Checks that the arrays are floating and have the same shape, and converts them to float32, in their order."""
    check_kind("floating", **arrays)
    (first, leading), *others = arrays.items()
    for name, array in others:
        if array.shape != leading.shape:
            raise AssertionError(
                f"{name} has the shape {array.shape}, but {first} has {leading.shape}: give equal shapes"
            )
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays.values())


def check_kind(kind: str, **arrays: Any) -> None:
    """Refuses arguments that are not arrays of a kind, "floating", "integer" or "boolean"; the message names one."""
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise AssertionError(f"{name}: an array is needed here, got {array!r}")
        if not jnp.issubdtype(array.dtype, _KINDS[kind]):
            raise AssertionError(f"{name}: an array of {kind} type is needed here, got {array.dtype}")


def check_shape(shape: tuple[int, ...], **arrays: Any) -> None:
    """Refuses arrays of another shape; the message names the argument."""
    for name, array in arrays.items():
        if array.shape != shape:
            raise AssertionError(f"{name} has the shape {array.shape}: {shape} is needed here")


def as_preference(preference: Any, shape: tuple[int, ...]) -> Float[Array, "*B"]:
    """A preference in float32 and in the given shape; None means 1, and a number is broadcast.

    A number outside of [0, 1] is refused. Such a number may be a beta, given by its position.
    """
    if preference is not None:
        check_between(0.0, 1.0, preference=preference)
    array = jnp.asarray(1.0 if preference is None else preference, jnp.float32)
    if array.ndim:
        check_shape(shape, preference=array)
    return jnp.broadcast_to(array, shape)


def as_counts(lengths: Int[Array, "*B"] | None, shape: tuple[int, ...], name: str) -> Float[Array, "*B"]:
    """Token counts in float32; an empty response counts as 1, so that division by the count is safe."""
    if lengths is None:
        raise ValueError(f"{name} is needed here: the number of scored tokens in each response")
    check_kind("integer", **{name: lengths})
    check_shape(shape, **{name: lengths})
    return jnp.maximum(jnp.asarray(lengths, jnp.float32), 1.0)


def check_positive(**settings: Any) -> None:
    """Refuses numbers that are not finite and above zero; traced values are not checked."""
    for name, value in settings.items():
        if (number := _number(name, value)) is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")


def check_between(low: float, high: float, **settings: Any) -> None:
    """Refuses numbers outside of [low, high], and infinite ones; traced values are not checked."""
    for name, value in settings.items():
        if (number := _number(name, value)) is not None and not (low <= number <= high and math.isfinite(number)):
            limits = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g}"
            raise ValueError(f"{name} must be {limits}, got {value}")


def check_smoothing(label_smoothing: float) -> None:
    """Refuses a probability of wrong labels of 1/2 or more."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")


def _number(name: str, value: Any) -> float | None:
    """A setting as a number; None for a traced value, or an array with a value for each example."""
    if isinstance(value, str | bool):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return None if isinstance(value, jax.core.Tracer) or np.ndim(value) else float(value)


def check_group(array: Array) -> None:
    """Refuses a group of fewer than two responses."""
    if array.shape[-1] < 2:
        raise ValueError(f"at least 2 responses a prompt are needed here, got {array.shape[-1]}")


def as_mask(mask: Bool[Array, "*B T"], shape: tuple[int, ...], name: str = "mask") -> Bool[Array, "*B T"]:
    """Checks that the mask is boolean and has the given shape, and returns it."""
    check_kind("boolean", **{name: mask})
    check_shape(shape, **{name: mask})
    return mask


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a value that is not one of the choices; the message names the nearest one."""
    if value not in (choices := tuple(choices)):
        raise ValueError(f"{name}: {unknown(value, choices)}")


def unknown(value: str, choices: Iterable[str]) -> str:
    """An error text for an unknown name: it gives the nearest valid name, and all valid names."""
    choices = tuple(choices)
    nearest = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ";"
    return f"unknown {value!r}{hint} valid: {', '.join(choices)}"
