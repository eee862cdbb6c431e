"""Records of a JSON-lines file, plain or gzip."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import itertools
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from alignment_gap.data.text.pair import Record
from alignment_gap.errors import UserError

SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
# In a plain file, the position of every line with a multiple of this number is kept; reading starts at one of them.
_STRIDE = 4096


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """A file with a JSON object on each line; a record's number is its line number, and blank lines count.

    Attributes:
      path: the file; a name that ends in `.gz` means gzip.
      split: the split of its records, or None.
    """

    path: pathlib.Path
    split: str | None = None

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The file."""
        return (self.path,)

    @property
    def identity(self) -> str:
        """Empty, because there is a file."""
        return ""

    @functools.cached_property
    def _index(self) -> tuple[int, tuple[int, ...]]:
        """The number of lines, and the byte positions of every `_STRIDE`-th line in the decompressed file."""
        number, position, entries = 0, 0, []
        for number, line in _lines(self.path):
            if (number - 1) % _STRIDE == 0:
                entries.append(position)
            position += len(line)
        return number, tuple(entries)

    def __len__(self) -> int:
        return self._index[0]

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The records of lines [start, stop), counted from 0.

        A gzip file is read from its beginning, except that a range after the last one continues from there.

        Raises:
          UserError: the file is missing, empty or damaged, or a line is not a JSON object.
        """
        entered, lines = self._enter(start)
        for number, line in itertools.islice(lines, start - entered, None if stop is None else stop - entered):
            if line.strip():
                where = f"{self.path}:{number}"
                yield Record(where, _parse(line, where), self.split)
        if self._zipped and stop is not None:
            self._left[:] = [(stop, lines)]

    def _enter(self, start: int) -> tuple[int, Iterator[tuple[int, bytes]]]:
        """The number of a line at or before `start`, and the lines from there on."""
        if self._zipped:
            return self._left.pop() if self._left and self._left[0][0] <= start else (0, _lines(self.path))
        entry = min(start // _STRIDE, len(self._index[1]) - 1) if start >= _STRIDE else 0
        return entry * _STRIDE, _lines(self.path, entry * _STRIDE, self._index[1][entry] if entry else 0)

    @property
    def _zipped(self) -> bool:
        return self.path.suffix == ".gz"

    @functools.cached_property
    def _left(self) -> list[tuple[int, Iterator[tuple[int, bytes]]]]:
        """The line at which the last range of a gzip file ended, and the lines from there on."""
        return []

    def __getstate__(self) -> dict[str, Any]:
        """The state for another process, without the open file."""
        return {name: value for name, value in self.__dict__.items() if name != "_left"}


def _lines(path: pathlib.Path, number: int = 0, position: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yields lines with their numbers (from 1), starting after line `number`, which ends at the byte `position`."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            file.seek(position)
            for number, line in enumerate(file, start=number + 1):  # noqa: B020
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip data after line {number} ({error}): fetch the file again") from None
    except OSError as error:
        raise unreadable(path, error) from None
    if not number:
        raise UserError(f"{path} is empty: give a file with a pair on each line")


def unreadable(path: pathlib.Path, error: OSError) -> UserError:
    """The error for a file that is missing or cannot be read."""
    return UserError(f"cannot read {path} ({error.strerror}): give the path of a file that can be read")


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): {_remedy(line)}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: this is a JSON {type(record).__name__}, not an object: {_remedy(line)}")
    return record


def _remedy(line: bytes) -> str:
    remedy = "write one JSON object on each line"
    return f"{remedy}; jq -c '.[]' does this for a list" if line.lstrip().startswith(b"[") else remedy
