"""The lengths of every example of a dataset, in tokens; read once and stored beside the records."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
from collections.abc import Iterator, Sequence

import msgpack
import numpy as np

from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.records.example import Example
from alignment_gap.errors import StorageError
from alignment_gap.folders import AnyPath
from alignment_gap.storage import Url

_BLOCK = 4096  # Records read at once.


def lengths_of(dataset: Sequence[Example]) -> np.ndarray:
    """Lengths of the prompt and of each response of every example, in tokens: int32[N, 1 + K].

    For a dataset on disk, the first call reads all records and stores the lengths beside them as `lengths-DIGEST.npy`.
    This file may be removed at any time.
    """
    if not isinstance(dataset, Dataset):
        return np.array([[len(e.prompt), *map(len, e.responses)] for e in dataset], np.int32)
    path = dataset.folder / f"lengths-{dataset.card.digest[:16]}.npy"
    shape = (len(dataset), 1 + dataset.card.responses_per_prompt)
    with contextlib.suppress(OSError, ValueError, EOFError):
        found = np.load(io.BytesIO(path.read_bytes()))
        if found.shape == shape and found.dtype == np.int32:
            return found
    lengths = np.fromiter(_lengths_on_disk(dataset), np.dtype((np.int32, shape[1:])), shape[0])
    # If the folder cannot be written, the records are read again next time.
    with contextlib.suppress(OSError, StorageError):
        _save(path, lengths)
    return lengths


def _save(path: AnyPath, lengths: np.ndarray) -> None:
    if isinstance(path, Url):
        content = io.BytesIO()
        np.save(content, lengths)
        path.write_bytes(content.getvalue())
        return
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")  # Several processes may write at once.
    try:
        with partial.open("xb") as file:
            np.save(file, lengths)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _lengths_on_disk(dataset: Dataset) -> Iterator[list[int]]:
    for start in range(0, len(dataset), _BLOCK):
        for record in dataset.records(range(start, min(start + _BLOCK, len(dataset)))):
            content = msgpack.unpackb(record)
            yield [len(content["prompt"]) // 4, *(len(response) // 4 for response in content["responses"])]
