"""T5X's oldest checkpoints: a single msgpack file of flax, with every tensor in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import flax.serialization
import msgpack

from alignment_gap.checkpoints.flax_msgpack import is_flax_file
from alignment_gap.checkpoints.formats import Foreign
from alignment_gap.checkpoints.t5x_legacy import INDEX, index_tree, open_tree
from alignment_gap.checkpoints.t5x_tree import t5_entries, t5_foreign
from alignment_gap.checkpoints.tensors import Tensor, exported
from alignment_gap.models import ModelConfig


def recognises(path: Path) -> bool:
    """Whether it is a msgpack file of flax, and not the index of a legacy checkpoint."""
    return path.is_file() and path.name != INDEX and is_flax_file(path)


def open_foreign(path: Path) -> Foreign:
    """Reads the T5 network in the target; raises UserError if the target holds no T5, or the file is cut short."""
    return t5_foreign(path, open_tree(path))


def write(output: Path, model: ModelConfig, tensors: Mapping[str, Tensor], companions: Path | None = None) -> None:
    """Writes the file, tensor by tensor, without optimizer state."""
    with output.open("wb") as file:
        _write(file, index_tree(exported(tensors, t5_entries(model))))


def _write(file: BinaryIO, value: Any) -> None:
    if isinstance(value, dict):
        file.write(msgpack.Packer().pack_map_header(len(value)))
        for key, child in value.items():
            file.write(msgpack.packb(key))
            _write(file, child)
    else:
        leaf = value.read(None) if isinstance(value, Tensor) else value
        file.write(flax.serialization.msgpack_serialize(leaf))
