"""Writes datasets part by part; a job that was killed continues after its finished parts."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from alignment_gap.data.records import Card, Dataset, Example, close_dataset, derived, open_dataset, write_chunk
from alignment_gap.data.records.dataset import CARD, chunk_path, discard_damaged, part_size
from alignment_gap.folders import AnyPath
from alignment_gap.progress import OpenBar
from alignment_gap.sharding import first_says, is_first_process, on_first_process


def write_parts(
    folder: AnyPath,
    count: int,
    make: Callable[[int, int], Iterable[Example]],
    *,
    made_by: str,
    inputs: Mapping[str, Dataset],
    facts: Mapping[str, Any],
    open_bar: OpenBar,
    scores: str = "probabilities",
    part: int | None = None,
) -> Card:
    """Writes a dataset that is made from others; a part that is already whole is not made again.

    Every process calls it and makes every missing part; only the first process writes.

    Args:
      folder: folder of the dataset.
      count: number of examples.
      make: `(start, stop) -> examples` makes the examples of a range; they depend only on `inputs` and `facts`.
      made_by: name of the command that makes the dataset, for the card.
      inputs: the datasets that it is made from, by their roles; all have one vocabulary.
      facts: everything else that decides the examples, as JSON values, for the card.
      open_bar: opens the progress bar.
      scores: kind of the examples' scores: "probabilities" or "rewards".
      part: examples in a record file; None for `part_size(count)`.
    """
    size = part or part_size(count)
    starts = range(0, count, size)
    on_first_process(lambda: _discard(folder))
    missing = first_says(lambda: np.array([not chunk_path(folder, _name(n)).exists() for n in range(len(starts))]))
    with open_bar(count, folder.name, " examples") as bar:
        for number, start in enumerate(starts):
            stop = min(start + size, count)
            if missing[number]:
                examples = make(start, stop)
                if is_first_process():
                    write_chunk(folder, _name(number), examples)
                else:
                    collections.deque(examples, maxlen=0)
            bar.update(stop - start)
    if missing.any() or not first_says(lambda: (folder / CARD).exists()):
        digest = next(iter(inputs.values())).card.vocabulary_digest
        provenance = derived(made_by, inputs, **facts)
        on_first_process(lambda: close_dataset(folder, vocabulary_digest=digest, provenance=provenance, scores=scores))
    return open_dataset(folder).card


def _name(part: int) -> str:
    return f"part-{part:05d}"


def _discard(folder: AnyPath) -> None:
    if (folder / CARD).exists():
        discard_damaged(folder)


def dataset_summary(folder: AnyPath) -> str:
    """Describes a finished dataset in one line."""
    card = open_dataset(folder).card
    return f"{folder}: {card.count:,} examples, digest {card.digest[:12]}"
