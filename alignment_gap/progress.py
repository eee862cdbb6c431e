"""The progress bar of all that takes long."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from alignment_gap.interruption import check_not_requested


@runtime_checkable
class Bar(Protocol):
    """What long work tells of itself; a context manager. The bars of tqdm are such."""

    def __enter__(self) -> Bar: ...

    def __exit__(self, *exception: Any) -> Any: ...

    def update(self, n: float = 1) -> Any:
        """So much more is done."""

    def unpause(self) -> Any:
        """The rate counts from now."""

    def set_postfix(self, **values: Any) -> Any:
        """Shows values beside the bar."""

    def write(self, s: str) -> Any:
        """Prints a line above the bar."""


# Opens the bar of a job: (total or None, title, unit) -> the bar, a context manager.
OpenBar = Callable[[int | None, str, str], Bar]


class _Bar(tqdm):
    """Where work that a signal asked to end ends, if it is in a thread that no signal interrupts."""

    def update(self, n: float = 1) -> Any:
        """So much more is done."""
        check_not_requested()
        return super().update(n)


class _NoBar(tqdm):
    """Says nothing; tqdm's own prints lines even where it is disabled."""

    def write(self, *args: Any, **kwargs: Any) -> None:
        """Drops a line."""


NO_BAR: Bar = _NoBar(disable=True)


def progress_bar(total: int | None, title: str, unit: str = "it", *, silent: bool = False) -> Bar:
    """A bar on standard error, with rate and time to go; without a terminal a line now and then is enough.

    A silent one shows nothing, and prints no line.
    """
    if silent:
        return NO_BAR
    shown = sys.stderr.isatty()
    every = 0.5 if shown else 30.0
    # Of several bars at the same time each has a line of its own on a terminal. Elsewhere nothing moves the cursor.
    position = None if shown else 0
    return _Bar(total=total, desc=title, unit=unit, mininterval=every, maxinterval=max(every, 10.0), position=position)
