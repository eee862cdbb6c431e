"""Where records are stored: opens a location, and joins all its records."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from alignment_gap.data.text.columnar import HuggingFace, Parquet, hugging_face_splits
from alignment_gap.data.text.json_lines import SUFFIXES, JsonLines
from alignment_gap.data.text.pair import Record
from alignment_gap.errors import UserError
from alignment_gap.folders import here

_SPLITS = {"train": "train", "training": "train"} | dict.fromkeys(
    ("validation", "valid", "valid1", "valid2", "dev", "test", "eval"), "validation"
)
LOCATIONS = (
    "a .jsonl, .json (either may end in .gz) or .parquet file, a folder of them, a Hugging Face dataset's folder, "
    "hub:ORG/NAME[/CONFIG][:SPLIT], tfds:NAME[/CONFIG][:SPLIT], or posts for the built-in task"
)


@runtime_checkable
class Records(Protocol):
    """Numbered raw records; picklable, so that several processes can each read a range."""

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The files with the records; none if the records come from another library's cache."""

    @property
    def identity(self) -> str:
        """A string that identifies the content of records without files; "" if there are files."""

    def __len__(self) -> int:
        """Number of records, including blank lines."""

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Records [start, stop) in order, counted from 0."""


@dataclasses.dataclass(frozen=True)
class Joined:
    """Several containers, one after another."""

    parts: tuple[Records, ...]

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The files of all parts."""
        return tuple(file for part in self.parts for file in part.files)

    @property
    def identity(self) -> str:
        """The identities of all parts."""
        return ",".join(part.identity for part in self.parts if part.identity)

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(itertools.accumulate(len(part) for part in self.parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Records [start, stop) in order, counted from 0 over all parts."""
        if start == 0 and stop is None:
            yield from itertools.chain.from_iterable(part.read() for part in self.parts)
            return
        first = 0
        for part, end in zip(self.parts, self._ends, strict=True):
            if start < end and (stop is None or first < stop):
                yield from part.read(max(start - first, 0), None if stop is None else min(stop, end) - first)
            first = end


def open_records(location: str) -> Joined:
    """The records at `location`, or at several, separated by commas; see `LOCATIONS`.

    Raises:
      UserError: there is nothing that can be read.
    """
    names = [location] if pathlib.Path(location).exists() else location.split(",")
    if not all(map(str.strip, names)):
        raise UserError(f"source {location!r} has nothing before or after a comma: give {LOCATIONS}")
    return Joined(tuple(part for name in names for part in _parts(name.strip())))


@functools.lru_cache(maxsize=256)
def split_name(split: str | None) -> str | None:
    """Translates a dataset's name for a split, such as "test_prefs", to "train" or "validation"; None for other names.

    A name is read word by word; ".", "-" and "_" separate words.

    Raises:
      UserError: the name has words for both.
    """
    words = _split_words(str(split))
    meanings = {_SPLITS[word.lower()] for word in words}
    if len(meanings) > 1:
        raise UserError(f"{split!r} names two splits, {' and '.join(words)}: rename it, so that it names one")
    return meanings.pop() if meanings else None


def _split_words(name: str) -> list[str]:
    """The words of a name that name a split."""
    return [word for word in re.split(r"[._-]", name) if word.lower() in _SPLITS]


def _parts(location: str) -> list[Records]:
    if location.startswith("tfds:"):
        from alignment_gap.data.text.tfds_records import tfds_parts

        return list(tfds_parts(location))
    if location.startswith("hub:"):
        name, _, split = location.removeprefix("hub:").partition(":")
        return _hugging_face(f"hub:{name}", split or None)
    path = here(location, "a source of texts")
    folder, separator, split = location.rpartition(":")
    if not path.exists() and separator and pathlib.Path(folder).is_dir():
        return _folder(pathlib.Path(folder), split or None)
    if path.is_dir():
        return _folder(path, None)
    return [_file(path)]


def _folder(folder: pathlib.Path, split: str | None) -> list[Records]:
    if any((folder / name).exists() for name in ("dataset_dict.json", "dataset_info.json", "state.json")):
        return _hugging_face(str(folder), split)
    found = [path for path in sorted(folder.iterdir()) if path.name.endswith((*SUFFIXES, ".parquet"))]
    files = [path for path in found if split is None or split in _split_words(path.name)]
    if not files:
        of = "" if split is None else f" of split {split!r}"
        raise UserError(f"{folder} has no data files{of}: give {LOCATIONS}")
    return [_file(path) for path in files]


def _file(path: pathlib.Path) -> Records:
    if path.name.endswith(".parquet"):
        return Parquet(path, _split_of(path))
    if path.name.endswith(SUFFIXES) or not path.exists():
        return JsonLines(path, _split_of(path))
    raise UserError(f"{path} is of an unknown kind: give {LOCATIONS}")


def _hugging_face(name: str, split: str | None) -> list[Records]:
    splits = hugging_face_splits(name)
    if split is not None and split not in splits:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(filter(None, splits)) or 'none'}")
    return [HuggingFace(name, each) for each in splits if split in (None, each)]


def _split_of(path: pathlib.Path) -> str | None:
    """The split in a file's name, such as `base.train.jsonl.gz` or `test-00000-of-00001.parquet`."""
    return path.name if split_name(path.name) else None
