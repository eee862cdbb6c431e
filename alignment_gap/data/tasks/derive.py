"""Datasets made from datasets, part by part, so that a run that was killed goes on from its finished parts."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from alignment_gap.data.batches.collation import Examples
from alignment_gap.data.batches.order import Order, draws_of
from alignment_gap.data.records.dataset import (
    CARD,
    Card,
    Dataset,
    Example,
    chunk_path,
    close_dataset,
    derived,
    discard_damaged,
    open_dataset,
    part_size,
    write_chunk,
)
from alignment_gap.folders import claim, locked
from alignment_gap.progress import progress_bar

SETTINGS = "settings.json"


def write_derived(
    output: pathlib.Path,
    count: int,
    make: Callable[[int, int], Iterable[Example]],
    *,
    made_by: str,
    inputs: Mapping[str, Dataset],
    facts: Mapping[str, Any],
    part: int = 0,
) -> Card:
    """Writes a dataset that is made from others into `output`; a part that is there and whole is not made again.

    Args:
      output: the folder.
      count: examples.
      make: `(start, stop) -> examples` of this range, which depend on nothing but what is told here.
      made_by: what makes it, for the card.
      inputs: the datasets that it is made from, by what they are to it; of one vocabulary.
      facts: whatever else decides the examples, for the card, as JSON values.
      part: examples of a record file, 0 for `part_size` of them.

    Raises:
      UserError: the folder was made with other settings, or the disk is full; finished parts are kept.
    """
    part = part or part_size(count)
    digests = {f"{role}.digest": dataset.card.digest for role, dataset in inputs.items()}
    with locked(output):
        settings = {"made_by": made_by, **facts, **digests, "part": part}
        claim(output / SETTINGS, settings, remedy="give another folder, these settings, or remove it")
        if (output / CARD).exists() and not discard_damaged(output):
            return open_dataset(output).card
        with progress_bar(count, made_by, " examples") as bar:
            for number, start in enumerate(range(0, count, part)):
                name, stop = f"part-{number:05d}", min(start + part, count)
                if not chunk_path(output, name).exists():
                    write_chunk(output, name, make(start, stop))
                bar.update(stop - start)
        digest = next(iter(inputs.values())).card.vocabulary_digest
        return close_dataset(output, vocabulary_digest=digest, provenance=derived(made_by, inputs, **facts))


def shuffle(dataset: Dataset, output: pathlib.Path, *, seed: int = 0, window: int = 0) -> Card:
    """The examples in a random order: of all, or within successive windows of so many examples."""
    count = len(dataset)
    order = Order((count,), (count,), seed, "window" if window else "shuffle", window)
    return _reorder([dataset], order, output, "shuffle", {"seed": seed, "window": window})


def mix(datasets: Sequence[Dataset], output: pathlib.Path, *, weights: Sequence[float] = (), seed: int = 0) -> Card:
    """The examples of several datasets in one random order.

    Args:
      datasets: of one vocabulary and form.
      output: the folder.
      weights: each dataset's share of as many places as there are examples: of a dataset with a smaller share than its
        size a random part is taken, of one with a larger share examples come again, none twice before all came once.
        Empty for every example once.
      seed: of the order.

    Raises:
      UserError: the datasets differ in vocabulary or form, or a weight is out of range; and as `write_derived`.
    """
    sizes = tuple(map(len, datasets))
    order = Order(sizes, draws_of(sizes, weights), seed)
    return _reorder(datasets, order, output, "mix", {"weights": list(weights), "seed": seed})


def distinct_prompts(dataset: Dataset) -> np.ndarray:
    """The numbers int64[N] of the first example of every prompt."""
    seen: set[bytes] = set()
    numbers = []
    for number, example in enumerate(dataset):
        digest = hashlib.sha256(example.prompt.tobytes()).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            numbers.append(number)
    return np.array(numbers, np.int64)


def _reorder(
    datasets: Sequence[Dataset], order: Order, output: pathlib.Path, made_by: str, facts: Mapping[str, Any]
) -> Card:
    Examples(datasets)  # Raises where they cannot be in one dataset.
    numbers = order.epoch(0)
    ends = np.cumsum(order.sizes)

    def make(start: int, stop: int) -> Iterator[Example]:
        for number in numbers[start:stop].tolist():
            home = int(np.searchsorted(ends, number, side="right"))
            yield datasets[home][number - int(ends[home])]

    roles = ["pairs"] if len(datasets) == 1 else [f"pairs {i}" for i in range(len(datasets))]
    inputs = dict(zip(roles, datasets, strict=True))
    return write_derived(output, len(numbers), make, made_by=made_by, inputs=inputs, facts=facts)
