"""Several prompts in one row: which examples of a batch share one, and the arrays that this makes of them.

How models read packed rows is in `models.packing`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket
from alignment_gap.data.records.example import TOKEN_FIELDS

# Shapes differ by an eighth of the rows that batches have on average: two or three are compiled, and few rows wasted.
_SHAPES = 8


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows are filled.

    Attributes:
      shape: (P, R), tokens of a row for prompts, and for each of the K rows of responses.
      slots: most prompts of a row.
      multiple: what the number of rows is a multiple of, up to one row for each prompt.
    """

    shape: Bucket
    slots: int
    multiple: int

    @classmethod
    def for_lengths(cls, lengths: np.ndarray, batch_size: int, shape: Bucket, multiple: int) -> Rows:
        """Rows for batches of examples of lengths int32[N, 1 + K], whose number is to be a multiple of `multiple`."""
        prompts = float((_capacity(shape, lengths.shape[1]) / lengths.mean(axis=0)).min())
        step = max(1, round(batch_size / prompts / _SHAPES / multiple))
        return cls(shape, min(2 * int(np.ceil(prompts)), batch_size), step * multiple)

    def fill(self, lengths: np.ndarray) -> np.ndarray:
        """The row int64[B] of each example of a batch, of which each fits into a row; no row is left empty.

        First fit decreasing: the longest first, each into the first row that has room for it.
        """
        capacity = _capacity(self.shape, lengths.shape[1])
        free, slots = np.tile(capacity, (len(lengths), 1)), np.full(len(lengths), self.slots)
        rows, used = np.zeros(len(lengths), np.int64), 0
        # Lengths as shares of their capacity, times both capacities: whole numbers are the same on every machine.
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
        """A batch of numpy arrays, one example a row, as packed rows.

        Args:
          batch: of n examples.
          rows: of each example, from 0 on, increasing.
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


# Fields with a value for each prompt, and with one for each token of each response.
_BY_PROMPT = ("prompt_ids", "prompt_lengths", "response_lengths", "scores")
_BY_TOKEN = ("responses", *TOKEN_FIELDS)


def _capacity(shape: Bucket, columns: int) -> np.ndarray:
    """Tokens int64[1 + K] that a row holds of the prompts, and of each prompt's first, second, ... responses."""
    return np.array([shape[0], *[shape[1]] * (columns - 1)])
