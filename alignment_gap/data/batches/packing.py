"""Packs several prompts into one row: chooses the examples that share a row, and builds the arrays.

`models.packing` describes how models read packed rows.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket
from alignment_gap.data.records.example import TOKEN_FIELDS

# Numbers of rows are rounded to an eighth of their mean, so only two or three shapes are compiled and little is wasted.
_SHAPES = 8


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows are filled.

    Attributes:
      shape: (P, R): tokens of a row of prompts, and of each of the K rows of responses.
      slots: maximum number of prompts in a row.
      multiple: the number of rows is rounded up to a multiple of this, but to no more than one row per prompt.
    """

    shape: Bucket
    slots: int
    multiple: int

    @classmethod
    def for_lengths(cls, lengths: np.ndarray, batch_size: int, shape: Bucket, multiple: int) -> Rows:
        """Rows for batches of examples with lengths int32[N, 1 + K]; their number is a multiple of `multiple`."""
        prompts = float((_capacity(shape, lengths.shape[1]) / lengths.mean(axis=0)).min())
        step = max(1, round(batch_size / prompts / _SHAPES / multiple))
        return cls(shape, min(2 * int(np.ceil(prompts)), batch_size), step * multiple)

    def fill(self, lengths: np.ndarray) -> np.ndarray:
        """The row of each example in a batch, int64[B]; every example must fit into a row, and no row stays empty.

        Uses first fit decreasing: the longest examples first, each into the first row with enough room.
        """
        capacity = _capacity(self.shape, lengths.shape[1])
        free, slots = np.tile(capacity, (len(lengths), 1)), np.full(len(lengths), self.slots)
        rows, used = np.zeros(len(lengths), np.int64), 0
        # The sum of length / capacity, multiplied by both capacities: integers, so the same on every machine.
        sizes = lengths @ _capacity(self.shape[::-1], lengths.shape[1])
        for example in np.argsort(-sizes, kind="stable"):
            fits = (free[: used + 1] >= lengths[example]).all(axis=1) & (slots[: used + 1] > 0)
            row = int(np.argmax(fits))
            rows[example], used = row, max(used, row + 1)
            free[row] -= lengths[example]
            slots[row] -= 1
        for row in range(used, min(-(-used // self.multiple) * self.multiple, len(lengths))):
            crowded = np.argmax(np.bincount(rows))
            rows[np.flatnonzero(rows == crowded)[-1]] = row
        return rows

    def pack(self, batch: PreferenceBatch, rows: np.ndarray) -> PreferenceBatch:
        """Packs a batch of numpy arrays that has one example per row.

        Args:
          batch: n examples.
          rows: the packed row of each example, increasing from 0.
        """
        firsts = np.searchsorted(rows, rows)
        slots, count = np.arange(len(rows)) - firsts, int(rows[-1]) + 1

        def in_slots(values: np.ndarray) -> np.ndarray:
            packed = np.zeros((count, self.slots, *values.shape[1:]), values.dtype)
            packed[rows, slots] = values
            return packed

        def behind_each_other(values: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
            packed, tokens = np.zeros((count, size), values.dtype), np.arange(values.shape[1])
            before = np.cumsum(lengths) - lengths
            places = (before - before[firsts])[:, None] + tokens
            real = tokens < lengths[:, None]
            packed[np.broadcast_to(rows[:, None], real.shape)[real], places[real]] = values[real]
            return packed

        def responses(values: np.ndarray) -> np.ndarray:
            each = zip(np.moveaxis(values, 1, 0), np.asarray(batch.response_lengths).T, strict=True)
            return np.stack([behind_each_other(*one, self.shape[1]) for one in each], axis=1)

        prompts = behind_each_other(np.asarray(batch.prompts), np.asarray(batch.prompt_lengths), self.shape[0])
        packed = {name: in_slots(np.asarray(getattr(batch, name))) for name in _BY_PROMPT}
        per_token = {name: value for name in _BY_TOKEN if (value := getattr(batch, name)) is not None}
        packed |= {name: responses(np.asarray(value)) for name, value in per_token.items()}
        return dataclasses.replace(batch, prompts=prompts, **packed)  # type: ignore[arg-type]


# Fields with one value per prompt, and fields with one value per token of each response.
_BY_PROMPT = ("prompt_ids", "prompt_lengths", "response_lengths", "scores")
_BY_TOKEN = ("responses", *TOKEN_FIELDS)


def _capacity(shape: Bucket, columns: int) -> np.ndarray:
    """Tokens that a row holds of the prompts, and of their first, second, ... responses: int64[1 + K]."""
    return np.array([shape[0], *[shape[1]] * (columns - 1)])
