"""Reads ahead: makes the batches of the next steps while the current step trains."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, TypeVar

from alignment_gap.errors import UserError

Batch = TypeVar("Batch")


class Prefetched(Generic[Batch]):
    """A source that makes the batches of the next steps in threads; use it as a context manager.

    It returns exactly what the underlying source returns. Any step may be requested; batches that were read ahead but
    not requested are dropped. An error of the source is raised when its step is requested.
    """

    def __init__(self, source: Callable[[int], Batch], ahead: int, last: int | None = None, threads: int = 1):
        """Reads `source` up to `ahead` steps early, but never step `last` or a later one.

        Raises:
          UserError: `ahead` is negative.
        """
        if ahead < 0:
            raise UserError(f"prefetch is {ahead}: it must be at least 0 batches")
        self._source, self._ahead, self._last = source, ahead, last
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._next: collections.deque[tuple[int, Future[Batch]]] = collections.deque()

    def __call__(self, step: int) -> Batch:
        """The batch of `step`."""
        if not self._ahead:
            return self._source(step)
        while self._next and self._next[0][0] != step:
            self._next.popleft()[1].cancel()
        following = self._next[-1][0] + 1 if self._next else step
        stop = step + self._ahead + 1 if self._last is None else max(step + 1, min(step + self._ahead + 1, self._last))
        for later in range(following, stop):
            self._next.append((later, self._threads.submit(self._source, later)))
        return self._next.popleft()[1].result()

    def __enter__(self) -> Prefetched[Batch]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: Any, trace: TracebackType | None) -> None:
        """Waits for the reads in progress and drops the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)
