"""Signals that ask a command to end: ctrl-c, a closed terminal, and SIGTERM from a scheduler that takes a machine back.

A loop of steps calls `requested` after each step; then it saves and raises `Interrupted`. All other work ends at once,
or, in a thread other than the main thread, at the next update of its progress bar.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# The exit status after SIGTERM: EX_TEMPFAIL of sysexits.h.
TRY_AGAIN = 75
# The received signals, the number of loops that call `requested`, whether one of them got the answer yes, and whether
# one of them runs in this thread.
_received: list[int] = []
_watching, _answered = 0, False
_lock, _asks = threading.Lock(), threading.local()


@contextlib.contextmanager
def signals_caught() -> Iterator[None]:
    """Catches SIGINT, SIGTERM and SIGHUP: the first one waits for a loop that calls `requested`.

    Without such a loop, or at the second signal, it raises KeyboardInterrupt. Under nohup, SIGHUP stays ignored. With
    several processes, jax catches SIGTERM itself, so that all processes end after the same step.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if len(_received) > 1 or not _watching:
            raise KeyboardInterrupt
        if number != signal.SIGTERM and _several_processes():
            os.kill(os.getpid(), signal.SIGTERM)

    caught = [signal.SIGINT, signal.SIGTERM]
    caught += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
    before = {number: signal.signal(number, receive) for number in caught}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """The context of a loop that calls `requested`: inside, the first signal does not interrupt."""
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
    """Whether this process was asked to end; with several processes, whether all should end after this step.

    With several processes, all must call it after the same steps, and after every step.
    """
    if not _several_processes():
        return bool(_received)
    from jax.experimental import multihost_utils

    global _answered
    _answered = _answered or multihost_utils.reached_preemption_sync_point(step)
    return _answered


def is_left_to_a_loop() -> bool:
    """Whether a loop that calls `requested` runs, or has ended because it was asked to."""
    return _watching > 0 or _answered


def check_not_requested() -> None:
    """Raises KeyboardInterrupt if a signal came and no loop in this thread calls `requested`.

    A signal interrupts only the main thread; work in other threads ends here.
    """
    if _received and not getattr(_asks, "here", False):
        raise KeyboardInterrupt


def from_keyboard() -> bool:
    """Whether ctrl-c was among the received signals; with several processes, jax may have caught the other signals."""
    return signal.SIGINT in _received


def has_received() -> bool:
    """Whether this process received a signal; with several processes, jax may have caught SIGTERM."""
    return bool(_received)


def _several_processes() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].process_count() > 1
