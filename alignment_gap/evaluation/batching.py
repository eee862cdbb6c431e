"""Runs jitted functions over examples, batch by batch, and returns the results to the host."""

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

# Number of batches whose examples are sorted into buckets together.
_WINDOW = 128


@dataclasses.dataclass(frozen=True)
class Batching:
    """Sends examples to the devices in batches; every process makes the same calls and gets all results.

    Attributes:
      mesh: the device mesh that splits a batch.
      batch_size: prompts in a batch.
      shapes: the shapes (P, R) that batches are padded to, in increasing order, as from `choose_buckets`.
    """

    mesh: LogicalMesh
    batch_size: int
    shapes: tuple[Bucket, ...]

    def __post_init__(self) -> None:
        """Raises UserError if a batch cannot be split over the mesh."""
        check_batch_size("batch_size", self.batch_size, self.mesh.batch_parts)

    def collate(self, examples: Sequence[Example]) -> PreferenceBatch:
        """The examples as numpy arrays of the largest shape; raises UserError if an example is too long."""
        return collate(examples, *self.shapes[-1])

    def run(self, function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
        """Applies a jitted function to equal slices of the arrays' first axis, and returns all results.

        The first rows fill the last slice up; their second results are dropped.
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
        """Yields every example with its row of the function's result, in the examples' order.

        The examples of a window are sorted into buckets. Full batches come from one bucket; the rest go together.
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
