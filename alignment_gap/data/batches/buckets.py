"""Shapes that batches are padded to: finds the one that fits an example, and chooses shapes with the least padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from alignment_gap.errors import UserError

# A bucket is a shape (P, R): the padded lengths of prompts and of responses in a batch, in tokens.
Bucket = tuple[int, int]
_GRID = 32  # Number of lengths that are tried as a bucket's limit; prompts and responses have this many each.


def check_buckets(buckets: Sequence[Bucket]) -> None:
    """Raises UserError unless the buckets are nested: an example that fits into one fits into all later ones."""
    for smaller, larger in itertools.pairwise(buckets):
        if not (smaller[0] <= larger[0] and smaller[1] <= larger[1] and smaller != larger):
            raise UserError(f"bucket {larger} does not hold bucket {smaller}: give shapes (P, R) that grow in both")
    if not buckets or min(buckets[0]) < 1:
        raise UserError(f"buckets is {tuple(buckets)}: give at least one shape (P, R), with P and R of 1 or more")


def bucket_of(lengths: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The index of the smallest bucket that fits each example, uint8[N]; raises UserError if none fits."""
    longest = (lengths[:, 0], lengths[:, 1:].max(axis=1))
    fitting = np.zeros(len(lengths), np.uint8)
    for axis, what in enumerate(("prompt", "response")):
        limits = np.array([bucket[axis] for bucket in buckets])
        least = np.searchsorted(limits, longest[axis]).astype(np.uint8)
        if (least == len(buckets)).any():
            number = int(np.argmax(least == len(buckets)))
            raise UserError(
                f"example {number} has a {what} of {longest[axis][number]} tokens, over {what}_length={limits[-1]}: "
                f"raise {what}_length or prepare the data with this limit"
            )
        np.maximum(fitting, least, out=fitting)
    return fitting


def cut_within_buckets(
    numbers: np.ndarray, fitting: np.ndarray, batch_size: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts example numbers into whole batches [n, B], each within a bucket; also returns the fewer than B that remain.

    Examples that do not fill a batch in their bucket move up to the next bucket.

    Args:
      numbers: numbers of the examples.
      fitting: the bucket of each example, from `bucket_of`.
      batch_size: B, examples per batch.
    """
    groups, rest = [], numbers[:0]
    for bucket in range(int(fitting.max(initial=0)) + 1):
        members = np.concatenate([rest, numbers[fitting == bucket]])
        whole = len(members) // batch_size * batch_size
        groups.append(members[:whole].reshape(-1, batch_size))
        rest = members[whole:]
    return groups, rest


def choose_buckets(lengths: np.ndarray, count: int, largest: Bucket, multiple: int = 8) -> tuple[Bucket, ...]:
    """Chooses at most `count` nested shapes with the least padding; the last one is `largest`.

    The candidate limits are quantiles of the lengths, rounded up to `multiple`. Dynamic programming over chains of
    shapes finds the best: a shape takes the examples that fit into it but not into the shape before.

    Args:
      lengths: int32[N, 1 + K] from `lengths_of`.
      count: maximum number of shapes, at least 1.
      largest: the shape that fits all examples.
      multiple: limits are rounded up to a multiple of this.

    Raises:
      UserError: `count` is below 1.
    """
    if count < 1:
        raise UserError(f"buckets is {count}: it must be at least 1")
    rows = (lengths[:, 0], lengths[:, 1:].max(axis=1))
    prompt, response = (_limits(row, top, multiple) for row, top in zip(rows, largest, strict=True))
    held = _held(rows, prompt, response).reshape(-1)
    p, r = np.repeat(prompt, len(response)), np.tile(response, len(prompt))
    slots = (p + r * (lengths.shape[1] - 1)).astype(np.float64)
    nested = (p[:, None] <= p) & (r[:, None] <= r)
    step = np.where(nested, (held - held[:, None]) * slots, np.inf)  # From one shape to the next.
    cost, before = held * slots, []
    for _ in range(count - 1):
        through = cost[:, None] + step
        before.append(through.argmin(axis=0))
        cost = through.min(axis=0)
    chain = [len(slots) - 1]
    for choice in reversed(before):
        chain.append(int(choice[chain[-1]]))
    return tuple(dict.fromkeys((int(p[i]), int(r[i])) for i in reversed(chain) if held[i]))


def _limits(lengths: np.ndarray, largest: int, multiple: int) -> np.ndarray:
    quantiles = np.quantile(lengths, np.linspace(0, 1, _GRID + 1)[1:], method="higher")
    rounded = -(-quantiles.astype(np.int64) // multiple) * multiple
    return np.unique(np.append(np.minimum(rounded, largest), largest))


def _held(rows: tuple[np.ndarray, np.ndarray], prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """The number of examples that fit into each pair of limits, int64[P', R']."""
    cells = np.searchsorted(prompt, rows[0]) * len(response) + np.searchsorted(response, rows[1])
    counts = np.bincount(cells, minlength=len(prompt) * len(response)).reshape(len(prompt), len(response))
    return counts.cumsum(axis=0).cumsum(axis=1)
