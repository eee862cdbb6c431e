"""T5X's legacy checkpoints (version 3): checkpoint_STEP/ with a msgpack index and a zarr folder for each large tensor.

The index is the file `checkpoint`, {version, optimizer: {target, state}}. Its leaves are arrays, or tensorstore specs
whose paths are relative to the index's folder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax.traverse_util import unflatten_dict

from alignment_gap.checkpoints.flax_msgpack import is_flax_file, read_tree
from alignment_gap.checkpoints.formats import Foreign
from alignment_gap.checkpoints.layout import check_parts, first_line, parts_of, stored_tensor
from alignment_gap.checkpoints.t5x import PREFIX, last_step
from alignment_gap.checkpoints.t5x_tree import TARGET, t5_entries, t5_foreign
from alignment_gap.checkpoints.tensors import Tensor, exported
from alignment_gap.errors import UserError
from alignment_gap.models import ModelConfig

INDEX = "checkpoint"
# The last four bytes of a gzip file give the uncompressed size.
_TRAILER = 4


def recognises(path: Path) -> bool:
    """Whether it is a folder with an index, a model's folder that contains such folders, or the index itself."""
    index = _index(path)
    return index.parent.is_dir() and index.name == INDEX and is_flax_file(index)


def open_foreign(path: Path) -> Foreign:
    """Reads the T5 network in the target; raises UserError if it holds no T5, or a part of a tensor is missing."""
    return t5_foreign(path, open_tree(_index(path)))


def open_tree(index: Path) -> dict[str, Tensor]:
    """All tensors of an index, in its target and its state, by dotted names; loads nothing.

    Raises:
      UserError: the index is damaged, or parts of tensors are missing or cut short; the message names the tensors.
    """
    tree = read_tree(index)
    tensors: dict[str, Tensor] = {}
    parts: dict[str, tuple[int, int]] = {}
    pending = [("", tree.get("optimizer", tree))]
    while pending:
        name, value = pending.pop()
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and "driver" in value:
            array = _open_array(name, index.parent, value)
            tensors[name], parts[name] = stored_tensor(array, name), (_whole_parts(array), parts_of(array))
        elif isinstance(value, dict):
            pending += [(f"{name}.{key}".removeprefix("."), child) for key, child in value.items()]
    check_parts(str(index.parent), parts)
    return tensors


def write(output: Path, model: ModelConfig, tensors: Mapping[str, Tensor], companions: Path | None = None) -> None:
    """Writes a model's folder with checkpoint_0: each parameter in a zarr folder, without optimizer state."""
    theirs = exported(tensors, t5_entries(model))
    folder = output / f"{PREFIX}0"
    folder.mkdir(parents=True)
    specs = {}
    for name, tensor in theirs.items():
        path = f"{TARGET}{name}/"
        spec = {
            "driver": "zarr",
            "dtype": tensor.dtype,
            "kvstore": {"driver": "file", "path": path},
            "metadata": {
                "chunks": list(tensor.shape),
                "compressor": {"id": "gzip", "level": 1},
                "shape": list(tensor.shape),
            },
        }
        array = ts.open(spec | {"kvstore": {"driver": "file", "path": str(folder.absolute() / path)}}, create=True)
        array.result().write(tensor.read(None)).result()
        specs[name] = spec
    (folder / INDEX).write_bytes(flax.serialization.msgpack_serialize(index_tree(specs)))


def index_tree(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of an index: the target with these leaves, and only the step as state, as T5X has for inference."""
    return {
        "version": 3,
        "optimizer": {"target": unflatten_dict(leaves, sep="."), "state": {"step": np.asarray(0, np.int32)}},
    }


def _index(path: Path) -> Path:
    step = last_step(path)
    return step / INDEX if step.is_dir() else step


def _open_array(name: str, folder: Path, spec: Mapping[str, Any]) -> Any:
    """Opens the zarr array of a spec in this folder; the spec's own bucket and driver belong to its writer."""
    kvstore, metadata = spec.get("kvstore", {}), dict(spec.get("metadata", {}))
    path = folder / Path(kvstore.get("path") or spec.get("path") or name).name
    ours = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}
    try:
        if (path / ".zarray").exists():
            return ts.open(ours, open=True, read=True).result()
        # Some copies lack the hidden files; the spec has the same metadata.
        stored = ts.dtype(spec["dtype"]).numpy_dtype if "dtype" in spec else np.dtype(metadata["dtype"])
        encoding = "bfloat16" if stored == jnp.bfloat16 else stored.str
        metadata = {"zarr_format": 2, "order": "C", "filters": None, "fill_value": None, "dtype": encoding} | metadata
        return ts.open(ours | {"metadata": metadata}, open=True, read=True, assume_metadata=True).result()
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): the checkpoint is damaged") from error


def _whole_parts(array: Any) -> int:
    """The number of chunks of an array that exist and, if compressed by gzip, are complete."""
    spec = array.spec(retain_context=False).to_json()
    chunk = array.chunk_layout.read_chunk.shape or ()
    size = math.prod(chunk) * array.dtype.numpy_dtype.itemsize % 2**32
    zipped = (spec.get("metadata", {}).get("compressor") or {}).get("id") == "gzip"
    counts = [range(-(-n // part)) for n, part in zip(array.shape, chunk, strict=True)]
    whole = 0
    for place in itertools.product(*counts):
        path = Path(spec["kvstore"]["path"]) / (".".join(map(str, place)) or "0")
        if path.is_file() and (not zipped or _unzipped_size(path) == size):
            whole += 1
    return whole


def _unzipped_size(path: Path) -> int:
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TRAILER, 0))
        return int.from_bytes(file.read(), "little")
