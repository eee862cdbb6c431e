"""Records of Parquet files and of Hugging Face datasets (on disk or by name), read in batches from any row."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from alignment_gap.data.text.pair import Record
from alignment_gap.errors import UserError

_BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Parquet:
    """The rows of a Parquet file, numbered from 1."""

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

    def __len__(self) -> int:
        with _reading(self.path):
            return _parquet_file(self.path).metadata.num_rows

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The records of rows [start, stop), counted from 0; raises UserError if the file is damaged."""
        with _reading(self.path):
            metadata = _parquet_file(self.path).metadata
            sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        stop = sum(sizes) if stop is None else min(stop, sum(sizes))
        first = 0
        for group, size in enumerate(sizes):
            if first < stop and first + size > start:
                yield from self._rows(group, first, max(start, first), min(stop, first + size))
            first += size

    def _rows(self, group: int, first: int, start: int, stop: int) -> Iterator[Record]:
        """Rows [start, stop) of the row group that begins with row `first`."""
        batches = _parquet_file(self.path).iter_batches(_BATCH, row_groups=[group])
        while first < stop:
            with _reading(self.path, first):
                batch = next(batches)
                low, high = max(start - first, 0), min(stop - first, len(batch))
                part = batch.slice(low, high - low) if low < high else batch[:0]
                rows = _decoded(part.to_pylist, part, self.path, first + low)
            for number, row in enumerate(rows, start=first + low + 1):
                yield Record(f"{self.path}:{number}", row, self.split)
            first += len(batch)


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """One split of a dataset that `datasets` opens; rows are numbered from 1.

    Attributes:
      name: a folder that `save_to_disk` wrote, or `hub:ORG/NAME[/CONFIG]`.
      split: the split; None for a dataset without splits.
    """

    name: str
    split: str | None = None

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The files of the dataset; none for a dataset on the hub."""
        if self.name.startswith("hub:"):
            return ()
        return tuple(sorted(pathlib.Path(self.name, self.split or "").glob("*.arrow")))

    @property
    def identity(self) -> str:
        """For a dataset on the hub, its name and the fingerprint from `datasets`; otherwise ""."""
        return "" if self.files else f"{self.name}:{self.split or ''}:{self._dataset._fingerprint}"

    @property
    def _dataset(self) -> Any:
        return _open_dataset(self.name, self.split)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """The records of rows [start, stop), counted from 0; raises UserError if the dataset is damaged."""
        stop = len(self) if stop is None else min(stop, len(self))
        place = self.name if self.split is None else f"{self.name}:{self.split}"
        for first in range(start, stop, _BATCH):
            with _reading(place, first):
                part = self._dataset.select(range(first, min(first + _BATCH, stop)))
                rows = _decoded(part.to_list, part.with_format("arrow")[:], place, first)
            for number, row in enumerate(rows, start=first + 1):
                yield Record(f"{place}:{number}", row, self.split)


def hugging_face_splits(name: str) -> tuple[str | None, ...]:
    """The splits of a folder or a `hub:` name; (None,) for a single split without a name."""
    with _reading(name):
        opened = _open(name)
    return tuple(opened) if isinstance(opened, dict) else (None,)


@functools.lru_cache(maxsize=8)
def _open(name: str) -> Any:
    datasets = _library("datasets")
    if not name.startswith("hub:"):
        return datasets.load_from_disk(name)
    organisation, *rest = name.removeprefix("hub:").split("/")
    path, config = "/".join([organisation, *rest[:1]]), "/".join(rest[1:]) or None
    try:
        return datasets.load_dataset(path, config)
    except ValueError as error:
        # Repositories on the hub may also keep subsets in folders that are not configs.
        if config is None or "BuilderConfig" not in str(error):
            raise
        return datasets.load_dataset(path, data_dir=config)


@functools.lru_cache(maxsize=8)
def _open_dataset(name: str, split: str | None) -> Any:
    with _reading(name):
        opened = _open(name)
    return opened if split is None else opened[split]


@functools.lru_cache(maxsize=8)
def _parquet_file(path: pathlib.Path) -> Any:
    return _library("pyarrow.parquet").ParquetFile(path)


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise UserError(f'{package} is not installed: pip install "alignment-gap[huggingface]"') from None


def _decoded(decode: Callable[[], list[Any]], table: Any, place: object, first: int) -> list[Any]:
    """Decodes the rows of an Arrow table with `decode`; raises UserError if a text is not UTF-8."""
    try:
        return decode()
    except UnicodeDecodeError:
        for row, (number, name) in itertools.product(range(len(table)), enumerate(table.schema.names)):
            try:
                table.column(number)[row].as_py()
            except UnicodeDecodeError as error:
                where = f"{place}:{first + row + 1}: the field {name!r}"
                raise UserError(f"{where} is not UTF-8 ({error.reason}): write the texts as UTF-8") from None
        raise


@contextlib.contextmanager
def _reading(place: object, record: int | None = None) -> Iterator[None]:
    """Turns errors from reading data into one line with place and reason; pyarrow raises ValueError and OSError."""
    where = place if record is None else f"{place}: from record {record + 1}"
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"cannot read {where} ({_short(error)}): give the path or the name of a dataset") from None
    except (ValueError, OSError, RuntimeError) as error:
        remedy = "fetch the file again"
        if str(place).startswith("hub:"):
            remedy = "check the name and the network, or fetch it elsewhere and give its folder"
        raise UserError(f"{where}: cannot be read ({_short(error)}): {remedy}") from None


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
