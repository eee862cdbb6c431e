"""Log-probs of a dataset's responses under a reference policy, stored beside the dataset.

    prepared/
      reference/KEY/
        log_probs.npy        float32, every token of every response, one example after another
        reference.json       identity of the log-probs, and the SHA-256 of the values; written last
        progress.json        until then: the number of finished batches, and their size

KEY is the start of a digest of the identity: the dataset, the checkpoint, the lengths and the precision.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.records.lengths import lengths_of
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, Outbox, copy_here, write_json

FOLDER, CARD, VALUES, PROGRESS = "reference", "reference.json", "log_probs.npy", "progress.json"
SAVE_EVERY = 60.0  # Seconds between two saves; a kill loses at most this much work.


class ReferenceLogProbs:
    """The stored log-probs of one dataset, with random access."""

    def __init__(self, dataset: Dataset, values: np.ndarray):
        """Use `open_reference`, which checks the values."""
        self._lengths = lengths_of(dataset)[:, 1:]
        self._starts = _starts(self._lengths)
        self._values = values

    def __call__(self, numbers: np.ndarray, response_length: int) -> np.ndarray:
        """Log-probs of these examples' responses in nats, 0 at padding: float32[len(numbers), K, R]."""
        places, mask = _places(self._starts[numbers], self._lengths[numbers], response_length)
        rows = np.zeros(mask.shape, np.float32)
        rows[mask] = self._values[places[mask]]
        return rows


class ReferenceWriter:
    """Stores log-probs batch by batch; a kill loses at most the last minute.

    Attributes:
      done: number of stored batches of this size; the caller continues with the next one.
    """

    def __init__(self, dataset: Dataset, identity: Mapping[str, Any], batch_size: int):
        self._place, self._identity = reference_folder(dataset, identity), dict(identity)
        self._outbox = Outbox(self._place)
        self._folder = self._outbox.folder
        self._batch_size = batch_size
        self._lengths = lengths_of(dataset)[:, 1:]
        self._starts = _starts(self._lengths)
        self._folder.mkdir(parents=True, exist_ok=True)
        path, progress = self._folder / VALUES, self._folder / PROGRESS
        size = (int(self._lengths.sum()),)
        before = json.loads(progress.read_text()) if progress.exists() and path.exists() else {}
        # The examples in a batch depend on the batch size.
        self.done: int = before["batches"] if before.get("batch_size") == batch_size else 0
        self._values = np.lib.format.open_memmap(path, "r+" if self.done else "w+", np.float32, size)
        with path.open("r+b") as file:  # Finds a full disk now, as an OSError; later it would be a signal.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._saved = time.monotonic()

    def write(self, numbers: np.ndarray, log_probs: np.ndarray) -> None:
        """Stores the log-probs [len(numbers), K, R] of these examples as the next batch."""
        places, mask = _places(self._starts[numbers], self._lengths[numbers], log_probs.shape[-1])
        self._values[places[mask]] = log_probs[mask]
        self.done += 1
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._save()

    def _save(self) -> None:
        """Flushes all batches so far to the disk."""
        self._values.flush()
        write_json(self._folder / PROGRESS, {"batches": self.done, "batch_size": self._batch_size})
        self._saved = time.monotonic()

    def close(self) -> None:
        """Completes the log-probs; they can be opened after this."""
        self._save()
        self._outbox.send()
        write_json(self._place / CARD, {"of": self._identity, "sha256": _sha256(self._folder / VALUES)})
        (self._place / PROGRESS).unlink()
        self._outbox.empty()


def reference_folder(dataset: Dataset, identity: Mapping[str, Any]) -> AnyPath:
    """The folder of the log-probs with this identity."""
    digest = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
    return dataset.folder / FOLDER / digest[:16]


def open_reference(dataset: Dataset, identity: Mapping[str, Any]) -> ReferenceLogProbs | None:
    """The stored log-probs of a dataset; None if there are none with this identity.

    Args:
      dataset: the scored dataset.
      identity: what determines the log-probs, as JSON values; "dataset" is the digest on the dataset's card.

    Raises:
      UserError: the stored log-probs belong to another version of the dataset, do not match the name of their folder,
        or were changed after they were stored.
    """
    cards: list[AnyPath] = [*(dataset.folder / FOLDER).glob(f"*/{CARD}")]
    for path in sorted(cards):
        found = _read_card(path)["of"]
        if found.get("dataset") != dataset.card.digest:
            raise UserError(
                f"{path.parent} has the log-probs of another version of {dataset.folder} (digest "
                f"{str(found.get('dataset'))[:12]}, now {dataset.card.digest[:12]}): remove it"
            )
    folder = reference_folder(dataset, identity)
    if not (folder / CARD).exists():
        return None
    card = _read_card(folder / CARD)
    wanted = json.loads(json.dumps(dict(identity)))
    differing = sorted(name for name in wanted.keys() | card["of"].keys() if wanted.get(name) != card["of"].get(name))
    if differing:
        raise UserError(f"{folder} has log-probs whose {', '.join(differing)} does not match its name: remove it")
    values = copy_here(folder / VALUES, card["sha256"]) if (folder / VALUES).exists() else None
    if values is None or _sha256(values) != card["sha256"]:
        raise UserError(f"{folder / VALUES} was changed after it was stored: remove {folder} to compute it again")
    return ReferenceLogProbs(dataset, np.load(values, mmap_mode="r"))


def find_reference(dataset: Dataset, key: str | None = None) -> ReferenceLogProbs | None:
    """The stored log-probs of a dataset, whatever their reference; None where there are none.

    Args:
      dataset: what was scored.
      key: the name of their folder; None for the only ones.

    Raises:
      UserError: several are stored and `key` is None, none is stored under `key`, or as `open_reference`.
    """
    names = sorted(path.parent.name for path in (dataset.folder / FOLDER).glob(f"*/{CARD}"))
    if key is None and len(names) > 1:
        raise UserError(f"{dataset.folder} has the log-probs of several references: choose one of {', '.join(names)}")
    if key is not None and key not in names:
        raise UserError(
            f"{dataset.folder} has no log-probs of the reference {key!r}: it has {', '.join(names) or 'none'}"
        )
    if not names:
        return None
    return open_reference(dataset, _read_card(dataset.folder / FOLDER / (key or names[0]) / CARD)["of"])


def _read_card(path: AnyPath) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text())
        return {"of": dict(card["of"]), "sha256": card["sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): remove {path.parent} to compute it again") from None


def _starts(lengths: np.ndarray) -> np.ndarray:
    """The position of each example's first value, int64[N], from the lengths of the responses [N, K]."""
    totals = lengths.sum(axis=1, dtype=np.int64)
    return np.cumsum(totals) - totals


def _places(starts: np.ndarray, lengths: np.ndarray, response_length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each token of the responses [n, K, R]: its position among the values, and whether it is not padding."""
    each = starts[:, None] + np.cumsum(lengths, axis=1) - lengths
    tokens = np.arange(response_length)
    return each[..., None] + tokens, tokens < lengths[..., None]


def _sha256(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
