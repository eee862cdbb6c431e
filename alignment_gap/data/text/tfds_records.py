"""Records of tensorflow-datasets, by name; imports TensorFlow when the first dataset is opened."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from alignment_gap.data.text.pair import Record
from alignment_gap.errors import UserError


@dataclasses.dataclass(frozen=True)
class TfdsRecords:
    """One split of a dataset that is prepared on this machine (`TFDS_DATA_DIR`), in the order of its files.

    Attributes:
      name: name for `tfds.builder`.
      split: split of the records.
    """

    name: str
    split: str

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The record files."""
        return tuple(pathlib.Path(file) for file in _builder(self.name).info.splits[self.split].filepaths)

    @property
    def identity(self) -> str:
        """Empty, because there are files."""
        return ""

    def __len__(self) -> int:
        return int(_builder(self.name).info.splits[self.split].num_examples)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Record]:
        """Records [start, stop), counted from 0; raises UserError if a record cannot be read."""
        stop = len(self) if stop is None else min(stop, len(self))
        if start >= stop:
            return
        tfds, tf = _library("tensorflow_datasets"), _library("tensorflow")
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        part = f"{self.split}[{start}:{stop}]"
        number = start
        try:
            rows = _builder(self.name).as_dataset(split=part, read_config=in_order, shuffle_files=False)
            for number, row in enumerate(rows.as_numpy_iterator(), start=start + 1):
                where = f"tfds:{self.name}:{self.split}:{number}"
                yield Record(where, _plain(row, where), self.split)
        except tf.errors.OpError as error:
            message = str(error.message).splitlines()[0][:120]
            where = f"tfds:{self.name}:{self.split}:{number + 1}"
            raise UserError(f"{where}: cannot be read ({message}): prepare the dataset again") from None


def tfds_parts(location: str) -> list[TfdsRecords]:
    """The splits of `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`; raises UserError if it is not prepared."""
    whole = location.removeprefix("tfds:")
    name, _, last = whole.rpartition(":")
    name, split = (name, last) if name and not re.fullmatch(r"[\d.*]+", last) else (whole, None)
    splits = list(_builder(name).info.splits)
    if split is not None and split not in splits:
        raise UserError(f"tfds:{name} has no split {split!r}: choose one of {', '.join(splits)}")
    return [TfdsRecords(name, each) for each in splits if split in (None, each)]


def _builder(name: str) -> Any:
    # TFDS itself reads the variable only when it is imported.
    return _open_builder(name, os.environ.get("TFDS_DATA_DIR"))


@functools.lru_cache(maxsize=8)
def _open_builder(name: str, folder: str | None) -> Any:
    tfds = _library("tensorflow_datasets")
    try:
        builder = tfds.builder(name, data_dir=folder)
    except (tfds.core.registered.DatasetNotFoundError, ValueError, RuntimeError) as error:
        message = (str(error).splitlines() or ["unknown"])[0][:120]
        raise UserError(f"tfds:{name} is not known to TFDS ({message}): check the name") from None
    if not builder.info.splits:
        remedy = (
            f"call its builder's download_and_prepare, or set TFDS_DATA_DIR; it is looked for in {builder.data_path}"
        )
        raise UserError(f"tfds:{name} is not prepared here: {remedy}")
    return builder


def _library(name: str) -> Any:
    # TensorFlow only reads data: it starts without messages, and leaves the accelerator to JAX.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        importlib.import_module("tensorflow").config.set_visible_devices([], "GPU")
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{name} is not installed: pip install "alignment-gap[data]"') from None


def _plain(value: Any, where: str) -> Any:
    """Converts numpy bytes, numbers and arrays to Python texts, numbers and lists."""
    if isinstance(value, dict):
        return {key: _plain(item, where) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 ({error.reason}): write the texts as UTF-8") from None
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    return [_plain(item, where) for item in value] if isinstance(value, list) else value
