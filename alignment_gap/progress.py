"""The progress bar for all long work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from alignment_gap.interruption import check_not_requested


@runtime_checkable
class Bar(Protocol):
    """The interface through which long work reports progress; a context manager. tqdm's bars have it."""

    def __enter__(self) -> Bar: ...

    def __exit__(self, *exception: Any) -> Any: ...

    def update(self, n: float = 1) -> Any:
        """Adds `n` to the finished work."""

    def unpause(self) -> Any:
        """Measures the rate from now on."""

    def set_postfix(self, **values: Any) -> Any:
        """Shows values next to the bar."""

    def write(self, s: str) -> Any:
        """Prints a line above the bar."""


# Opens a job's bar: (total or None, title, unit) -> the bar, a context manager.
OpenBar = Callable[[int | None, str, str], Bar]


class _Bar(tqdm):
    """A bar whose update ends the work after a signal; needed in threads, which signals do not interrupt."""

    def update(self, n: float = 1) -> Any:
        """Adds `n` to the finished work."""
        check_not_requested()
        return super().update(n)

    def unpause(self) -> None:
        """Measures the rate from now on, without the work that was finished before."""
        super().unpause()
        self.initial = self.last_print_n = self.n


class _NoBar(tqdm):
    """A bar that prints nothing; tqdm itself prints lines even if it is disabled."""

    def write(self, *args: Any, **kwargs: Any) -> None:
        """Drops a line."""


NO_BAR: Bar = _NoBar(disable=True)


def progress_bar(total: int | None, title: str, unit: str = "it", *, silent: bool = False) -> Bar:
    """A bar on standard error, with rate and remaining time; without a terminal it prints a line now and then.

    A silent bar prints nothing at all.
    """
    if silent:
        return NO_BAR
    shown = sys.stderr.isatty()
    every = 0.5 if shown else 30.0
    # On a terminal, each of several bars has its own line. Elsewhere, the cursor cannot move.
    position = None if shown else 0
    return _Bar(total=total, desc=title, unit=unit, mininterval=every, maxinterval=max(every, 10.0), position=position)
