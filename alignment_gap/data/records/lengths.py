"""How long every example of a dataset is, in tokens; read once and kept beside the records."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence

import msgpack
import numpy as np

from alignment_gap.data.records.dataset import Dataset, Example

_BLOCK = 4096  # Records read at once.


def lengths_of(dataset: Sequence[Example]) -> np.ndarray:
    """Tokens int32[N, 1 + K] of the prompt and of each response of every example.

    For a dataset on disk they are read from all records once and kept beside them, as `lengths-DIGEST.npy`; the file
    may be removed at any time.
    """
    if not isinstance(dataset, Dataset):
        return np.array([[len(e.prompt), *map(len, e.responses)] for e in dataset], np.int32)
    path = dataset.folder / f"lengths-{dataset.card.digest[:16]}.npy"
    shape = (len(dataset), 1 + dataset.card.responses_per_prompt)
    with contextlib.suppress(OSError, ValueError):
        found = np.load(path)
        if found.shape == shape and found.dtype == np.int32:
            return found
    lengths = np.fromiter(_lengths_on_disk(dataset), np.dtype((np.int32, shape[1:])), shape[0])
    with contextlib.suppress(OSError):  # A folder that cannot be written is read again the next time.
        descriptor, partial = tempfile.mkstemp(dir=dataset.folder, suffix=".partial")
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, lengths)
        os.replace(partial, path)
    return lengths


def _lengths_on_disk(dataset: Dataset) -> Iterator[list[int]]:
    for start in range(0, len(dataset), _BLOCK):
        for record in dataset.records(range(start, min(start + _BLOCK, len(dataset)))):
            content = msgpack.unpackb(record)
            yield [len(content["prompt"]) // 4, *(len(response) // 4 for response in content["responses"])]
