"""Helpers for every source: its output does not change with a restart, at any step."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def assert_equal_output_after_restore(make_source: Callable[[], Callable[[int], Any]], steps: int) -> list[Any]:
    """Asserts that a source that restarts at any step gives the same batches from there on.

    A restart knows only the step; a training checkpoint keeps no more.

    Returns:
      The batches of the run without a restart, for further checks.
    """
    source = make_source()
    through = [jax.device_get(source(step)) for step in range(steps)]
    for start in range(steps):
        restored = make_source()
        for step in range(start, steps):
            assert_equal_batches(jax.device_get(restored(step)), through[step])
    return through


def assert_union_of_processes(
    make_source: Callable[[Any], Callable[[int], Any]], steps: int, counts: tuple[int, ...] = (2, 4)
) -> None:
    """Asserts that the rows of all processes, in order, are the rows that one process reads.

    The number of processes changes at every step, as it may when a run continues elsewhere.
    """
    whole = make_source(None)
    parts = {
        count: [make_source(lambda rows, i=i, n=count: range(i * rows // n, (i + 1) * rows // n)) for i in range(count)]
        for count in counts
    }
    for step in range(steps):
        count = counts[step % len(counts)]
        rows = [part(step) for part in parts[count]]
        assert_equal_batches(jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows), whole(step))


def assert_equal_batches(first: Any, second: Any) -> None:
    """Asserts equality bit for bit, with equal structures, dtypes and shapes."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, strict=True)
