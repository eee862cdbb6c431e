"""Composes a dataset from others: shuffled, mixed by weight, or cut to the first examples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from alignment_gap import checks
from alignment_gap.data.batches import Examples
from alignment_gap.data.batches.order import ORDERS, SEED_LIMIT, Order, draws_of
from alignment_gap.data.records import Dataset, Example
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath
from alignment_gap.jobs.folder import Kind, Opened
from alignment_gap.jobs.label import open_checked
from alignment_gap.jobs.parts import dataset_summary, write_parts
from alignment_gap.progress import OpenBar


@dataclasses.dataclass(frozen=True)
class ComposeConfig:
    """Datasets to combine into one.

    Attributes:
      datasets: folders, separated by commas; all have one vocabulary and one form.
      weights: the weight of each dataset, in any unit; None to take every example once. The result has as many examples
        as all datasets together, split by the weights. If a dataset has more examples than its part, a random subset is
        taken. If it has fewer, examples repeat, but none comes twice before all have come once.
      order: "shuffle", "recorded" (one dataset after another), or "window" (shuffled within successive windows).
      window: examples in a window; only for order "window".
      seed: seed of the order.
      limit: keep only this many examples, the first in that order; None for all.
    """

    datasets: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    order: str = "shuffle"
    window: int | None = None
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or two settings conflict."""
        checks.one_of(self, ORDERS, "order")
        checks.at_least(self, 1, "window", "limit")
        checks.within(self, 0, SEED_LIMIT - 1, "seed")
        if (self.window is None) == (self.order == "window"):
            raise UserError(
                f"window is {self.window} with order {self.order!r}: set it for order window, and only then"
            )
        if self.weights is not None and self.order != "shuffle":
            raise UserError(f"weights is {self.weights} with order {self.order!r}: leave weights out, or shuffle")


def open_composition(config: ComposeConfig) -> Opened:
    """Opens the datasets; raises UserError if one cannot be used, or they cannot be combined."""
    if not config.datasets:
        raise UserError("datasets is not set: give the folder of a prepared dataset, or several separated by commas")
    datasets = [open_checked(folder, "datasets") for folder in config.datasets]
    Examples(datasets)  # Raises if they differ in vocabulary or form.
    sizes = tuple(map(len, datasets))
    order = Order(sizes, draws_of(sizes, config.weights), config.seed, config.order, config.window)
    roles = ["pairs"] if len(datasets) == 1 else [f"pairs {i}" for i in range(len(datasets))]
    facts = {"weights": config.weights, "order": config.order, "window": config.window, "seed": config.seed}

    def run(folder: AnyPath, open_bar: OpenBar) -> None:
        numbers = order.epoch(0)[: config.limit]
        ends = np.cumsum(sizes)

        def make(start: int, stop: int) -> Iterator[Example]:
            for number in numbers[start:stop].tolist():
                home = int(np.searchsorted(ends, number, side="right"))
                yield datasets[home][number - int(ends[home])]

        write_parts(
            folder,
            len(numbers),
            make,
            made_by="compose",
            inputs=dict(zip(roles, datasets, strict=True)),
            facts=facts | {"limit": config.limit},
            open_bar=open_bar,
            scores=datasets[0].card.scores,
        )

    digests = zip(roles, datasets, strict=True)
    return Opened({f"{role}.digest": dataset.card.digest for role, dataset in digests}, run)


def distinct_prompts(dataset: Dataset, limit: int | None = None) -> np.ndarray:
    """The index of the first example of each distinct prompt, int64[N]; for the first `limit` prompts if it is set."""
    seen: set[bytes] = set()
    numbers: list[int] = []
    for number, example in enumerate(dataset):
        if len(numbers) == limit:
            break
        digest = hashlib.sha256(example.prompt.tobytes()).digest()[:16]
        if digest not in seen:
            seen.add(digest)
            numbers.append(number)
    return np.array(numbers, np.int64)


COMPOSE = Kind(
    name="compose",
    command="data compose",
    config=ComposeConfig,
    open=open_composition,
    summary=dataset_summary,
    repairs=True,
)
