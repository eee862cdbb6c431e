"""The offline source: from datasets to the batch of any step."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket, bucket_of, check_buckets, cut_within_buckets
from alignment_gap.data.batches.collation import Examples
from alignment_gap.data.batches.order import Order, Stream, draws_of, kept, permutation
from alignment_gap.data.batches.packing import Rows
from alignment_gap.data.records.example import Example
from alignment_gap.errors import UserError

# Makes the random order of an epoch's batches independent of the order of its examples.
_BATCHES = 1
# Examples that are read together, for several steps: one random read of 512 records costs half as much as 16 reads of
# 32.
_BLOCK = 512
# To estimate the padding of an epoch, about this many of its examples are packed. That takes a tenth of a second.
_SAMPLED = 8192


@dataclasses.dataclass(frozen=True)
class Padding:
    """Counts of token slots in an epoch's batches, for prompts and responses together.

    Attributes:
      slots: token slots in the batches' arrays.
      tokens: slots that hold a token.
    """

    slots: int
    tokens: int

    @property
    def share(self) -> float:
        """The fraction of the slots that hold padding."""
        return 1 - self.tokens / self.slots


class OfflineSource:
    """Batches of datasets. `source(step)` is a pure function of the step, so a killed run continues where it was.

    The position in the data is the step alone, for any number of processes.
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        batch_size: int,
        buckets: tuple[Bucket, ...],
        packing: Rows | None,
        host_rows: Callable[[int], Sequence[int] | np.ndarray] | None,
    ):
        """Use `offline_source`, which checks the settings."""
        self.examples, self.order, self.batch_size, self.buckets = examples, order, batch_size, buckets
        self._packing, self._host_rows = packing, host_rows or range
        self._stream = Stream(order)
        self._plan = kept(self._make_plan)
        self._steps_of_block = max(1, _BLOCK // len(self._host_rows(batch_size)))
        self._block = kept(self._read_block)
        self._lengths = examples.lengths() if packing or len(buckets) > 1 else None
        # The bucket of every example. With packing there is only one bucket, and this checks that all examples fit.
        fitting = None if self._lengths is None else bucket_of(self._lengths, buckets)
        self._bucket = fitting if len(buckets) > 1 else None
        self._rows = kept(self._fill_rows, 2 * self._steps_of_block)

    def __call__(self, step: int) -> PreferenceBatch:
        """The batch of `step`, counted from 0, as numpy arrays; only the rows of this process are read."""
        block, place = divmod(step, self._steps_of_block)
        numbers, found = self._block(block)[place]
        batch = self.examples.collate(numbers, found, self.shape(self.numbers(step)))
        return batch if self._packing is None else self._packing.pack(batch, self._own(step)[1])

    def rows(self, step: int) -> int:
        """Rows of the whole batch of `step`: the batch size, or fewer if rows hold several prompts."""
        return self.batch_size if self._packing is None else int(self._rows(step).max()) + 1

    def numbers(self, step: int) -> np.ndarray:
        """The numbers of the examples in the whole batch of `step`, int32[B]; they index `Examples`."""
        if step < 0:
            raise UserError(f"step={step} has no batch: steps count from 0")
        epoch = step * self.batch_size // len(self.order)
        return self._plan(epoch)[step - self._first_step(epoch)]

    def shape(self, numbers: np.ndarray) -> Bucket:
        """The shape (P, R) of a batch of these examples: the smallest bucket that fits all of them."""
        return self.buckets[0 if self._bucket is None else int(self._bucket[numbers].max())]

    def padding(self, epoch: int = 0, *, prompts_only: bool = False) -> Padding:
        """Counts of the batches that start in `epoch`; with packing, only the batches of the first 8192 examples.

        Counts responses too, unless `prompts_only`.
        """
        lengths, plan = self.examples.lengths(), self._plan(epoch)
        lengths = lengths[:, :1] if prompts_only else lengths
        shapes = self.buckets if self._packing is None else (self._packing.shape,)
        slots = np.array([p + r * (lengths.shape[1] - 1) for p, r in shapes])
        if self._packing is not None:
            plan = plan[:: -(-plan.size // _SAMPLED)]
            rows = sum(int(self._packing.fill(lengths[numbers]).max()) + 1 for numbers in plan)
            return Padding(int(rows * slots[0]), int(lengths.sum(axis=1)[plan].sum()))
        fitting = np.zeros(len(plan), np.uint8) if self._bucket is None else self._bucket[plan].max(axis=1)
        return Padding(int(self.batch_size * slots[fitting].sum()), int(lengths.sum(axis=1)[plan].sum()))

    def _fill_rows(self, step: int) -> np.ndarray:
        """The packed row of each example in the whole batch of `step`."""
        assert self._packing is not None and self._lengths is not None
        return self._packing.fill(self._lengths[self.numbers(step)])

    def _own(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the examples that this process reads for `step`, and their rows among this process's rows."""
        numbers, own = self.numbers(step), np.asarray(self._host_rows(self.rows(step)))
        if self._packing is None:
            return numbers[own], np.arange(len(own))
        rows = self._rows(step)
        members = np.flatnonzero(np.isin(rows, own))
        members = members[np.argsort(rows[members], kind="stable")]
        return numbers[members], np.searchsorted(own, rows[members])

    def _read_block(self, block: int) -> list[tuple[np.ndarray, list[Any]]]:
        """For each step of a block: the numbers of this process's examples, and the examples that were read."""
        steps = range(block * self._steps_of_block, (block + 1) * self._steps_of_block)
        numbers = [self._own(step)[0] for step in steps]
        found = iter(self.examples.read(np.concatenate(numbers)))
        return [(each, list(itertools.islice(found, len(each)))) for each in numbers]

    def _first_step(self, epoch: int) -> int:
        """The first step whose batch starts in `epoch`."""
        return -(-epoch * len(self.order) // self.batch_size)

    def _make_plan(self, epoch: int) -> np.ndarray:
        """The batches that start in `epoch`, int32[steps, B].

        The first examples of the epoch complete the batch that the previous epoch could not fill. So no example is lost
        or repeated within an epoch, and a step's epoch follows from the step alone.
        """
        size, places = self.batch_size, len(self.order)
        own = self._stream.epoch(epoch)[-epoch * places % size :]
        batches, rest = self._grouped(own, epoch)
        if rest.size:
            following = self._stream((epoch + 1) * places, size - rest.size)
            batches = np.concatenate([batches, np.concatenate([rest, following])[None]])
        return batches

    def _grouped(self, numbers: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples in whole batches [n, B], and the fewer than B that remain.

        A shuffled order is cut within each bucket. The other orders are cut as they are.
        """
        size = self.batch_size
        if self._bucket is None or self.order.kind != "shuffle":
            whole = len(numbers) // size * size
            return numbers[:whole].reshape(-1, size), numbers[whole:]
        groups, rest = cut_within_buckets(numbers, self._bucket[numbers], size)
        batches = np.concatenate(groups)
        return batches[permutation(len(batches), self.order.seed, epoch, 0, _BATCHES)], rest


def offline_source(
    dataset: Sequence[Example] | Examples,
    *,
    batch_size: int,
    seed: int,
    prompt_length: int,
    response_length: int,
    order: str = Order.kind,
    window: int | None = None,
    buckets: Sequence[Bucket] = (),
    packing: int | None = None,
    row_multiple: int = 1,
    weights: Sequence[float] | None = None,
    host_rows: Callable[[int], Sequence[int] | np.ndarray] | None = None,
) -> OfflineSource:
    """Batches of `dataset`, epoch after epoch; a batch may hold the end of one epoch and the start of the next.

    Args:
      dataset: the examples, on disk or in memory; several datasets as `Examples`.
      batch_size: B, prompts per batch over all processes.
      seed: seed of the shuffle, from 0 to 2**32 - 1.
      prompt_length: P, maximum padded length of prompts in tokens.
      response_length: R, maximum padded length of responses in tokens.
      order: "shuffle", uniform over the dataset; "recorded", the dataset's own order: the batch of step s has the
        records from s * B to (s + 1) * B; "window", the dataset's order shuffled within successive windows. Every epoch
        has a new shuffle.
      window: batches in a window, for order "window"; None for the other orders.
      buckets: smaller shapes (P, R); each is at least as large as the one before. With order "shuffle", a batch takes
        examples of one bucket and is padded to that bucket. With the other orders, batches have the same examples as
        without buckets, and are padded to the smallest bucket that fits. Needs the lengths of all examples; see
        `lengths_of`.
      packing: None for one prompt per row. Otherwise a row of (packing * P, packing * R) tokens holds as many prompts
        as fit. A batch has the same prompts as without packing, in fewer rows. Needs the lengths of all examples.
        Excludes buckets.
      row_multiple: the number of packed rows is a multiple of this: the number of parts that a batch is split into over
        devices and microbatches. It must divide `batch_size`.
      weights: the weight of each dataset, in any unit; only for order "shuffle". An epoch has as many examples as
        without weights, split among the datasets by weight. None to take every example once.
      host_rows: returns which rows of a batch this process reads, given the number of rows; None for all.

    Raises:
      UserError: a setting is out of range, the dataset is empty, or an example is longer than its limit.
    """
    examples = dataset if isinstance(dataset, Examples) else Examples([dataset])
    largest = (prompt_length, response_length)
    shapes = (*[bucket for bucket in buckets if tuple(bucket) != largest], largest)
    check_buckets(shapes)
    _check_rows(batch_size, packing, row_multiple, shapes)
    if weights is not None and order != "shuffle":
        raise UserError(f"weights is {tuple(weights)} with the order {order!r}: leave weights out, or shuffle")
    together = None if window is None else window * batch_size
    places = Order(examples.sizes, draws_of(examples.sizes, weights), seed, order, together)
    rows = None
    if packing is not None:
        shape = (packing * prompt_length, packing * response_length)
        rows = Rows.for_lengths(examples.lengths(), batch_size, shape, row_multiple)
    return OfflineSource(examples, places, batch_size, shapes, rows, host_rows)


def _check_rows(batch_size: int, packing: int | None, row_multiple: int, shapes: Sequence[Bucket]) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    if packing is not None and packing < 1:
        raise UserError(f"packing is {packing}: it must be at least 1, or None for one prompt per row")
    if packing is not None and len(shapes) > 1:
        raise UserError(f"packing is {packing} with buckets={tuple(shapes[:-1])}: choose one of them")
    if row_multiple < 1 or batch_size % row_multiple:
        raise UserError(f"row_multiple is {row_multiple}: it must be a divisor of batch_size={batch_size}")
