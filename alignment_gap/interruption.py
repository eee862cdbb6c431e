"""Signals that ask a command to end: ctrl-c, and the SIGTERM of a scheduler that takes the machine back.

A loop of steps asks `requested` after each of them, saves and raises `Interrupted`. All other work ends at once, or in
a thread beside the main one at the next update of its progress bar.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# The exit status of what SIGTERM has ended, EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75
# The signals that came, how many loops ask for them, and whether one does in this thread.
_received: list[int] = []
_watching = 0
_lock, _asks = threading.Lock(), threading.local()


@contextlib.contextmanager
def signals_caught() -> Iterator[None]:
    """The first SIGINT or SIGTERM waits for the loop that asks for it; without one, or a second time, it ends.

    It then raises KeyboardInterrupt. Of several processes jax catches SIGTERM itself, so that all end after one step.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if len(_received) > 1 or not _watching:
            raise KeyboardInterrupt
        if number == signal.SIGINT and _several_processes():
            os.kill(os.getpid(), signal.SIGTERM)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """For a loop that asks `requested`: until it ends, the first signal does not."""
    _count(1)
    _asks.here = True
    try:
        yield
    finally:
        _asks.here = False
        _count(-1)


def _count(change: int) -> None:
    global _watching
    with _lock:
        _watching += change


def requested(step: int) -> bool:
    """Whether this process was asked to end or, of several processes, all shall end after this step.

    Several processes have to ask after every step, all of them after the same ones.
    """
    if not _several_processes():
        return bool(_received)
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)


def check_not_requested() -> None:
    """Raises KeyboardInterrupt where a signal came and no loop of this thread asks for it.

    A signal interrupts the main thread alone. Work in other threads ends here.
    """
    if _received and not getattr(_asks, "here", False):
        raise KeyboardInterrupt


def from_keyboard() -> bool:
    """Whether ctrl-c was among the signals that came; of several processes jax may have caught the others itself."""
    return signal.SIGINT in _received


def from_scheduler() -> bool:
    """Whether SIGTERM was among the signals that came to this process."""
    return signal.SIGTERM in _received


def _several_processes() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].process_count() > 1
