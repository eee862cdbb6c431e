"""The order of the examples in an epoch: a pure function of the seed and the epoch."""

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
    """An endless sequence of epochs over one or several datasets; numbers count on from one dataset to the next.

    Attributes:
      sizes: number of examples in each dataset.
      draws: number of examples that each dataset contributes to an epoch; equal to `sizes` without weights. No example
        of a dataset repeats before all its examples have come once, even if that takes several epochs.
      seed: seed of the shuffle.
      kind: one of `ORDERS`.
      window: examples that are shuffled together, for kind "window"; None for the other kinds.
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
                f"window is {self.window} with the order {self.kind!r}: set it for the order 'window', and only then"
            )

    def __len__(self) -> int:
        """Examples in an epoch."""
        return sum(self.draws)

    def epoch(self, number: int) -> np.ndarray:
        """The numbers of the examples in epoch `number`, in order: int32[len(self)]."""
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
        """The examples that `epoch` takes from a dataset: the next `draws` in the dataset's own endless shuffle."""
        size, draws = self.sizes[dataset], self.draws[dataset]
        start, stop = epoch * draws, (epoch + 1) * draws
        rounds = range(start // size, -(-stop // size))
        drawn = np.concatenate([permutation(size, self.seed, turn, dataset + 1) for turn in rounds])
        return drawn[start - rounds.start * size :][:draws]


class Stream:
    """All epochs of an order in one sequence, readable at any position; caches the last two epochs."""

    def __init__(self, order: Order):
        self.order = order
        self.epoch = kept(order.epoch)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """The `count` numbers from position `start` on: int32[count]."""
        parts = []
        while count:
            epoch, place = divmod(start, len(self.order))
            parts.append(self.epoch(epoch)[place : place + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def kept(function: Callable[[int], Any], size: int = 2) -> Callable[[int], Any]:
    """Caches a function's last results; each is computed only once, even with several threads."""
    cached, lock = functools.lru_cache(maxsize=size)(function), threading.Lock()

    def call(number: int) -> Any:
        with lock:
            return cached(number)

    return call


def random_keys(count: int, *seed: int) -> np.ndarray:
    """Random uint64[count] from a seed: the raw output of PCG64, which NumPy promises to keep in later versions."""
    return np.random.PCG64(seed).random_raw(count)


def permutation(count: int, *seed: int) -> np.ndarray:
    """A uniformly random permutation of the numbers below `count`: int32[count]."""
    return np.argsort(random_keys(count, *seed), kind="stable").astype(np.int32)


def draws_of(sizes: Sequence[int], weights: Sequence[float] | None) -> tuple[int, ...]:
    """How many examples each dataset contributes to an epoch of sum(sizes) examples.

    The numbers are proportional to the weights; the largest remainders are rounded up. Without weights, each dataset
    contributes all its examples.

    Raises:
      UserError: a weight is not positive, or so small that its dataset contributes nothing; or the number of weights is
        not the number of datasets.
    """
    if weights is None:
        return tuple(sizes)
    if len(weights) != len(sizes):
        raise UserError(f"weights is {tuple(weights)}, but there are {len(sizes)} datasets: give one weight for each")
    shares = np.asarray(weights, np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise UserError(f"weights is {tuple(weights)}: each must be above 0 and finite; or leave its dataset out")
    exact = shares / shares.sum() * sum(sizes)
    draws = np.floor(exact).astype(np.int64)
    missing = sum(sizes) - int(draws.sum())
    draws[np.argsort(draws - exact, kind="stable")[:missing]] += 1
    if not draws.all():
        least = int(np.argmin(draws))
        raise UserError(
            f"weight {weights[least]} gives dataset {least} none of the {sum(sizes)} examples of an epoch: raise it"
        )
    return tuple(int(count) for count in draws)
