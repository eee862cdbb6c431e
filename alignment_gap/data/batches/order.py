"""The order of an epoch: which example stands at which place, a pure function of the seed and the epoch."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alignment_gap import checks
from alignment_gap.errors import UserError

ORDERS = ("shuffle", "recorded", "window")
SEED_LIMIT = 2**32


@dataclasses.dataclass(frozen=True)
class Order:
    """An endless sequence of epochs over the examples of one or several datasets, numbered one dataset after another.

    Attributes:
      sizes: examples of each dataset.
      draws: places of each dataset in an epoch; equal to `sizes` where nothing is weighted. Each dataset goes through
        all of its examples before one of them comes again, however many epochs that takes.
      seed: of the shuffle.
      kind: one of `ORDERS`.
      window: examples that are shuffled together, for kind "window"; None for the others.
    """

    sizes: tuple[int, ...]
    draws: tuple[int, ...]
    seed: int
    kind: str = "shuffle"
    window: int | None = None

    def __post_init__(self) -> None:
        checks.one_of(self, ORDERS, "kind")
        checks.within(self, 0, SEED_LIMIT - 1, "seed")
        checks.at_least(self, 1, "window")
        if (self.window is None) == (self.kind == "window"):
            raise UserError(
                f"window is {self.window} with the order {self.kind!r}: give one for the order 'window' only"
            )

    def __len__(self) -> int:
        """Places of an epoch."""
        return sum(self.draws)

    def epoch(self, number: int) -> np.ndarray:
        """The numbers int32[len(self)] of epoch `number`'s examples, in order."""
        count = len(self)
        if self.kind == "recorded":
            return np.arange(count, dtype=np.int32)
        if self.window is not None:
            keys = random_keys(count, self.seed, number)
            return np.lexsort((keys, np.arange(count, dtype=np.int32) // self.window)).astype(np.int32)
        places = permutation(count, self.seed, number)
        if self.draws == self.sizes:
            return places
        starts = np.cumsum((0, *self.sizes[:-1]))
        drawn = [start + self._drawn(dataset, number) for dataset, start in enumerate(starts)]
        return np.concatenate(drawn).astype(np.int32)[places]

    def _drawn(self, dataset: int, epoch: int) -> np.ndarray:
        """What `epoch` takes of a dataset: the next `draws` of its own endless shuffle."""
        size, draws = self.sizes[dataset], self.draws[dataset]
        start, stop = epoch * draws, (epoch + 1) * draws
        rounds = range(start // size, -(-stop // size))
        drawn = np.concatenate([permutation(size, self.seed, turn, dataset + 1) for turn in rounds])
        return drawn[start - rounds.start * size :][:draws]


class Stream:
    """The epochs of an order one after another, read at any place; the last two epochs are kept."""

    def __init__(self, order: Order):
        self.order = order
        self.epoch = kept(order.epoch)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """The numbers int32[count] at the places from `start` on."""
        parts = []
        while count:
            epoch, place = divmod(start, len(self.order))
            parts.append(self.epoch(epoch)[place : place + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def kept(function: Callable[[int], Any], size: int = 2) -> Callable[[int], Any]:
    """A cache of a function's last results, which computes each once whatever the number of threads."""
    cached, lock = functools.lru_cache(maxsize=size)(function), threading.Lock()

    def call(number: int) -> Any:
        with lock:
            return cached(number)

    return call


def random_keys(count: int, *seed: int) -> np.ndarray:
    """uint64[count] from a seed; raw output of PCG64, which NumPy promises not to change between versions."""
    return np.random.PCG64(seed).random_raw(count)


def permutation(count: int, *seed: int) -> np.ndarray:
    """A uniformly random order int32[count] of the numbers below `count`."""
    return np.argsort(random_keys(count, *seed), kind="stable").astype(np.int32)


def draws_of(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """Places of each dataset in an epoch of sum(sizes) places: in proportion to the weights, largest remainders up.

    Without weights each dataset has a place for each of its examples.

    Raises:
      UserError: a weight is not positive, so small that its dataset gets no place, or there is not one for each.
    """
    if weights is None:
        return tuple(sizes)
    if len(weights) != len(sizes):
        raise UserError(f"weights is {tuple(weights)}, {len(weights)} for {len(sizes)} datasets: give one for each")
    shares = np.asarray(weights, np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise UserError(f"weights is {tuple(weights)}: each must be above 0 and finite, or leave its dataset out")
    exact = shares / shares.sum() * sum(sizes)
    draws = np.floor(exact).astype(np.int64)
    missing = sum(sizes) - int(draws.sum())
    draws[np.argsort(draws - exact, kind="stable")[:missing]] += 1
    if not draws.all():
        least = int(np.argmin(draws))
        raise UserError(
            f"weight {weights[least]} of dataset {least} gives it none of the {sum(sizes)} places of an epoch: raise it"
        )
    return tuple(int(count) for count in draws)
