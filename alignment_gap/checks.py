"""Checks of settings for a config's `__post_init__`; each raises UserError with the value, the limit and the remedy.

None means that a setting is not set, and passes every check. NaN fails every range check.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from alignment_gap.errors import UserError


def at_least(config: Any, least: float, *names: str) -> None:
    """Checks that each named setting is `least` or more."""
    for name, value in _numbers(config, names):
        if not value >= least:
            raise UserError(f"{name} is {value}: it must be at least {least}")


def above(config: Any, limit: float, *names: str) -> None:
    """Checks that each named setting is more than `limit`, and finite."""
    for name, value in _numbers(config, names):
        if not limit < value < float("inf"):
            raise UserError(f"{name} is {value}: it must be above {limit} and finite")


def within(config: Any, low: float, high: float, *names: str) -> None:
    """Checks that each named setting is from `low` to `high`."""
    for name, value in _numbers(config, names):
        if not low <= value <= high:
            raise UserError(f"{name} is {value}: it must be from {low} to {high}")


def one_of(config: Any, choices: Iterable[Any], *names: str) -> None:
    """Checks that each named setting is one of the choices; the error names the nearest choice."""
    for name, value in _values(config, names):
        if value not in (valid := tuple(choices)):
            raise UserError(f"{name} is {value!r}: {nearest(str(value), map(str, valid))}")


def nearest(value: str, choices: Iterable[str]) -> str:
    """The remedy for a name that is not among the choices: the nearest choice, or all of them."""
    valid = tuple(choices)
    near = get_close_matches(value, valid, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(valid)}"


def _values(config: Any, names: Iterable[str]) -> list[tuple[str, Any]]:
    return [(name, value) for name in names if (value := getattr(config, name)) is not None]


def _numbers(config: Any, names: Iterable[str]) -> list[tuple[str, float]]:
    values = _values(config, names)
    for name, value in values:
        if not isinstance(value, int | float):
            raise UserError(f"{name} is {value!r}: it must be a number")
    return values
