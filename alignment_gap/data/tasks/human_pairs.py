"""Human preference pairs of any source in memory, encoded: what a study is run on without a prepared dataset."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from alignment_gap.data.records.dataset import Example
from alignment_gap.data.tasks.prepare import example_of
from alignment_gap.data.text import (
    Dropped,
    Encoded,
    Limits,
    TextSource,
    TextSourceConfig,
    encode_pair,
    held_out,
    open_source,
)
from alignment_gap.data.text.vocabulary import Vocabulary
from alignment_gap.errors import UserError


@dataclasses.dataclass(frozen=True)
class HumanPairs:
    """Encoded pairs and what was left out.

    Attributes:
      examples: responses in the source's order, scores such as (1, 0); equal prompts have equal prompt ids.
      dropped: records that were left out, by reason.
    """

    examples: list[Example]
    dropped: Mapping[str, int]


def read_human_pairs(
    config: TextSourceConfig, vocabulary: Vocabulary, limits: Limits, *, limit: int | None = None
) -> HumanPairs:
    """Reads and encodes the pairs of a source; responses end in the end id.

    Args:
      config: the source, and what becomes of pairs that hold no preference.
      vocabulary: encodes the texts.
      limits: most tokens of prompts and responses, and what becomes of longer ones.
      limit: pairs to keep, None for all; the rest of the source is not read.

    Raises:
      UserError: the source or a record is unusable, a setting is unknown, or no pair is left.
    """
    limits.validate()
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} is out of range: choose 1 or more")
    examples: list[Example] = []
    counts: collections.Counter[str] = collections.Counter()
    numbers = _PromptNumbers()
    for item in _encoded(open_source(config), vocabulary, limits):
        if isinstance(item, Dropped):
            counts[item.reason] += 1
            continue
        examples.append(example_of(item, numbers(item.prompt)))
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{config.location}: {_nothing_left(counts)}")
    return HumanPairs(examples, dict(sorted(counts.items())))


def split_by_prompt(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, about `fraction` of the prompts in the latter, no prompt in both.

    Where a prompt goes depends on its tokens and the seed alone, not on what else there is.
    """
    training: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        (validation if held_out(example.prompt.tobytes(), fraction, seed) else training).append(example)
    return training, validation


def _encoded(source: TextSource, vocabulary: Vocabulary, limits: Limits) -> Iterator[Encoded | Dropped]:
    """Every record of the source as ids, or why it was left out."""
    seen: set[bytes] = set()
    for pair in source.read():
        if isinstance(pair, Dropped):
            yield pair
        elif source.drops_duplicates and pair.key in seen:
            yield Dropped("duplicate", pair.where)
        else:
            seen.add(pair.key)
            yield encode_pair(pair, vocabulary, limits, bad_pairs=source.config.bad_pairs)


class _PromptNumbers:
    """Numbers prompts in the order of their first appearance."""

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}

    def __call__(self, prompt: np.ndarray) -> int:
        return self._number.setdefault(prompt.tobytes(), len(self._number))


def _nothing_left(dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    return f"none of {sum(dropped.values())} pairs is left ({reasons}): raise the lengths or give other pairs"
