"""Examples through jitted functions, batch by batch, and their results back on the host."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from alignment_gap.data.batches import Bucket, PreferenceBatch, collate
from alignment_gap.data.batches.buckets import bucket_of, cut_within_buckets
from alignment_gap.data.records import Example, lengths_of
from alignment_gap.sharding import LogicalMesh, check_batch_size, host_rows, put_batch, to_host

Result = TypeVar("Result")

# Batches of examples that are brought into buckets together.
_WINDOW = 128


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples reach the devices; every process calls it alike and gets all results.

    Attributes:
      mesh: the device mesh, over which a batch is split.
      batch_size: prompts at a time.
      shapes: (P, R) that batches are padded to, each holding the one before it, as from `choose_buckets`.
    """

    mesh: LogicalMesh
    batch_size: int
    shapes: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        """Raises UserError if a batch cannot be split over the mesh."""
        check_batch_size("batch_size", self.batch_size, self.mesh.batch_parts)

    def collate(self, examples: Sequence[Example]) -> PreferenceBatch:
        """The examples as numpy arrays of the largest shape; raises UserError where one is over a length."""
        return collate(examples, *self.shapes[-1])

    def run(self, function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
        """Applies a jitted function to slices of equal size of the arrays' first axis; returns its results.

        The last slice is filled up with the first rows, whose results are dropped.
        """
        count, size = len(arrays[0]), self.batch_size
        padded = np.resize(np.arange(count), -(-count // size) * size)
        held = host_rows(self.mesh, size)
        results = []
        for start in range(0, len(padded), size):
            rows = padded[start : start + size][held]
            results.append(to_host(function(*put_batch(tuple(array[rows] for array in arrays), self.mesh, size))))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *results)

    def each(
        self, examples: Iterable[Example], function: Callable[[PreferenceBatch], Sequence[Result]]
    ) -> Iterator[tuple[Example, Result]]:
        """Every example with its row of what the function gives for a batch, in the examples' order.

        Batches are of one bucket where it fills them; for that a window of examples is held at a time.
        """
        rest = iter(examples)
        while window := list(itertools.islice(rest, _WINDOW * self.batch_size)):
            found: dict[int, Result] = {}
            fitting = bucket_of(lengths_of(window), self.shapes)
            groups, left = cut_within_buckets(np.arange(len(window)), fitting, self.batch_size)
            for numbers in itertools.chain(*groups, [left] if len(left) else []):
                batch = collate([window[number] for number in numbers], *self.shapes[fitting[numbers].max()])
                found.update(zip(numbers.tolist(), function(batch), strict=True))
            yield from ((example, found[number]) for number, example in enumerate(window))
