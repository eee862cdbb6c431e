"""The built-in posts as records that are generated when they are read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

from alignment_gap.configuration import to_dict
from alignment_gap.data.text import posts
from alignment_gap.data.text.pair import Record


@dataclasses.dataclass(frozen=True)
class PostsRecords:
    """Training pairs, then validation pairs; each follows from the seed and the number of its post.

    Attributes:
      config: number of pairs, seed and settings.
    """

    config: posts.PostsConfig

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """Empty, because no file is read."""
        return ()

    @property
    def identity(self) -> str:
        """The settings; they determine all records."""
        return f"posts:{json.dumps(to_dict(self.config), sort_keys=True)}"

    def __len__(self) -> int:
        return self.config.pairs + self.config.validation_pairs

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Records [start, stop), counted from 0; raises UserError if the settings allow no pair for a post."""
        stop = len(self) if stop is None else min(stop, len(self))
        return (self._record(number) for number in range(start, stop))

    def _record(self, number: int) -> Record:
        held_out = number - self.config.pairs
        split, row = ("train", number) if held_out < 0 else ("validation", held_out)
        post = row if held_out < 0 else posts.VALIDATION_START + row
        pair = posts.pair(self.config.seed, post, self.config.settings)
        first, second = (" ".join(words) for words in pair.responses)
        values = {"post": " ".join(pair.post.words), "first": first, "second": second, "preferred": pair.preferred}
        return Record(f"posts:{split}:{row + 1}", values, split)
