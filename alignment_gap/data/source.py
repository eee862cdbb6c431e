"""The offline source: from a dataset to the batch of any step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from alignment_gap.data.batch import PreferenceBatch
from alignment_gap.data.records import Example, collate
from alignment_gap.errors import UserError

ORDERS = ("shuffle", "recorded", "window")
_SEED_LIMIT = 2**32


@dataclasses.dataclass(frozen=True)
class OfflineSource:
    """Batches of a dataset: `source(step)` is a pure function of the step, so a killed run goes on where it was.

    Attributes:
      numbers: for each step the numbers of its examples in the dataset.
      batches: the batches themselves, without end.
    """

    numbers: grain.MapDataset
    batches: grain.MapDataset

    def __call__(self, step: int) -> PreferenceBatch:
        """The batch of numpy arrays of `step`, counted from 0."""
        if step < 0:
            raise UserError(f"step={step} has no batch: steps count from 0")
        return self.batches[step]


def offline_source(
    dataset: Sequence[Example],
    *,
    batch_size: int,
    seed: int,
    prompt_length: int,
    response_length: int,
    order: str = "shuffle",
    window: int = 0,
) -> OfflineSource:
    """Batches of `dataset`, epoch after epoch, a batch reaching over into the next epoch where it must.

    Args:
      dataset: the examples, on disk or in memory.
      batch_size: B.
      seed: of the shuffle, from 0 to 2**32 - 1.
      prompt_length: P, tokens that prompts are padded to.
      response_length: R, tokens that responses are padded to.
      order: "shuffle", uniform over the dataset and anew in every epoch; "recorded", as they are in the dataset, the
        batch of step s being records s * B to (s + 1) * B; "window", the record shuffled within successive windows,
        the same in every epoch.
      window: batches in a window; for order "window" only.

    Raises:
      UserError: a setting is out of range, or the dataset is empty.
    """
    _check(dataset, batch_size, seed, order, window)
    order_of: Any = grain.MapDataset.range(len(dataset)).seed(seed)
    if order == "shuffle":
        order_of = order_of.shuffle()
    elif order == "window":
        order_of = grain.MapDataset.source(_Windows(len(dataset), window * batch_size, seed))
    numbers = order_of.repeat().batch(batch_size, batch_fn=list)

    def read(batch: list[int]) -> PreferenceBatch:
        return collate([dataset[i] for i in batch], prompt_length, response_length)

    return OfflineSource(numbers, numbers.map(read))


class _Windows:
    """The numbers below `count`, shuffled within successive windows; the last one may be shorter."""

    def __init__(self, count: int, size: int, seed: int):
        self._count, self._size, self._seed = count, size, seed
        self._permutation = functools.lru_cache(maxsize=4)(self._permute)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        window, row = divmod(index, self._size)
        return window * self._size + int(self._permutation(window)[row])

    def _permute(self, window: int) -> np.ndarray:
        length = min(self._size, self._count - window * self._size)
        return np.random.Generator(np.random.PCG64([self._seed, window])).permutation(length)


def _check(dataset: Sequence[Example], batch_size: int, seed: int, order: str, window: int) -> None:
    if order not in ORDERS:
        raise UserError(f"order={order!r} is unknown: choose one of {', '.join(ORDERS)}")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is out of range: set it to 1 or more")
    if not 0 <= seed < _SEED_LIMIT:
        raise UserError(f"seed={seed} is out of range: set it from 0 to {_SEED_LIMIT - 1}")
    if (window > 0) != (order == "window"):
        raise UserError(f"window={window} does not go with order={order!r}: set it to 1 or more for 'window', else 0")
    if not len(dataset):
        raise UserError("the dataset is empty: check what was dropped from it")
