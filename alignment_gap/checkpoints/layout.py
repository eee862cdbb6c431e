"""Checkpoints on disk, tensor by tensor: the layout that Orbax writes and restores, without the whole in memory.

RUN/tokenizer/           the files that came with imported parameters, and go with what is trained from them
RUN/checkpoints/STEP/
  params/                what `Checkpoints` keeps of the parameters: an OCDBT store of zarr arrays, one for each
  optimizer/             of a training run only
  _CHECKPOINT_METADATA   Orbax's, with the network as custom metadata

In a bucket each array is a zarr store of its own, and the metadata are written last: a step is complete with them.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from alignment_gap.checkpoints.digest import TensorsDigest, json_digest
from alignment_gap.checkpoints.network import Network, from_json, to_json
from alignment_gap.checkpoints.tensors import SHOWN, STACK, Tensor
from alignment_gap.configuration import to_dict
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath
from alignment_gap.storage import Url, explained, is_of_the_store

CHECKPOINTS, PARAMS, NETWORK, TOKENIZER = "checkpoints", "params", "network", "tokenizer"
METADATA = "_CHECKPOINT_METADATA"
# Under this name a checkpoint says what it holds, to be compared with what is read.
DIGESTS = "digests"
# Of another library's message, as much as one line bears.
LONGEST = 160
# Bytes of the largest chunk of an array: what a device that restores its part reads at least.
LARGEST_CHUNK = 2**26
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class Stored(NamedTuple):
    """A checkpoint, of which nothing is loaded yet.

    Attributes:
      folder: of this step.
      network: what it holds, or None where it does not say.
      tensors: its parameters by dotted names.
    """

    folder: AnyPath
    network: Network | None
    tensors: dict[str, Tensor]


def find_checkpoint(path: AnyPath, step: int | None = None) -> AnyPath:
    """The folder of a step, or of the last one, in a run's folder, its checkpoints/ or the step's folder itself.

    Raises:
      UserError: where there is none.
    """
    if (path / PARAMS).is_dir():
        return path
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"{path} has no complete checkpoint: give the folder of a training job or of an import")
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"{folder} has no checkpoint of step {step}: choose one of {there}, or none for the last")
    return folder / str(steps[-1] if step is None else step)


def complete_steps(folder: AnyPath) -> list[int]:
    """The steps of the checkpoints in a run's checkpoints/, in order; none where it is not there."""
    if isinstance(folder, Url):
        return sorted(int(path.parent.name) for path in folder.glob(f"*/{METADATA}") if path.parent.name.isdigit())
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def tokenizer_of(folder: AnyPath) -> AnyPath | None:
    """Where the files are that came with the parameters of a step's folder, in its run; None where there are none."""
    tokenizer = folder.parent.parent / TOKENIZER
    return tokenizer if tokenizer.is_dir() else None


def read_network(folder: AnyPath) -> Network | None:
    """What the checkpoint of a step says of its network; None for one written before checkpoints did."""
    values = _said(folder, NETWORK)
    return from_json(values) if values else None


def read_digest(folder: AnyPath) -> str | None:
    """The `params_digest` that the checkpoint of a step says it has; None for one written before checkpoints did.

    That of adapters is one of them, their settings and their base.
    """
    digest, network = (_said(folder, DIGESTS) or {}).get(PARAMS), read_network(folder)
    if digest is None or network is None or network.adapter is None:
        return digest
    return json_digest([digest, to_dict(network.adapter), network.base_digest])


def _said(folder: AnyPath, name: str) -> Any:
    path = folder / METADATA
    try:
        return json.loads(path.read_text())["custom_metadata"].get(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged, take another") from error


def known_network(folder: AnyPath) -> Network:
    """As `read_network`; raises UserError where the checkpoint does not say."""
    network = read_network(folder)
    if network is None:
        raise UserError(
            f"{folder} does not say what network it holds, as checkpoints did before they carried it: "
            "give MODEL, the model that it was trained as"
        )
    return network


def open_checkpoint(path: AnyPath, step: int | None = None) -> Stored:
    """A checkpoint's network and parameters, to be read one by one; `path` and `step` as of `find_checkpoint`."""
    folder = find_checkpoint(path, step)
    return Stored(folder, read_network(folder), open_store(folder / PARAMS))


def write_checkpoint(run: Path, step: int, network: Network, tensors: Mapping[str, Tensor]) -> Path:
    """Writes parameters as the checkpoint of a step, which `Checkpoints` restores; it appears when it is complete.

    Tensors are read one at a time, of a stacked one a layer; what the libraries buffer comes to that. What is not
    float32 becomes it, as parameters are.

    Args:
      run: the folder that will have checkpoints/.
      step: of the checkpoint.
      network: what it holds.
      tensors: its parameters by dotted names.

    Returns:
      The checkpoint's folder.

    Raises:
      UserError: where there is a checkpoint of this step already.
    """
    folder = run / CHECKPOINTS / str(step)
    if folder.exists():
        raise UserError(f"{folder} exists already: give another folder, or remove it")
    # By this name Orbax knows an unfinished checkpoint.
    partial = folder.with_name(f"{step}.orbax-checkpoint-tmp")
    shutil.rmtree(partial, ignore_errors=True)
    digest, holds = TensorsDigest(tensors), to_json(network)
    write_store(partial / PARAMS, digest.tensors)
    digests = {PARAMS: digest.value(), NETWORK: json_digest(holds)}
    metadata: dict[str, Any] = {
        "item_handlers": {PARAMS: _HANDLER},
        "custom_metadata": {NETWORK: holds, DIGESTS: digests},
    }
    metadata |= {"metrics": {}, "performance_metrics": {}}
    (partial / METADATA).write_text(json.dumps(metadata))
    os.replace(partial, folder)
    return folder


def write_store(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as one Orbax tree, which `open_store` and Orbax read; floating ones as float32."""
    folder.mkdir(parents=True)
    for name, tensor in tensors.items():
        stored = jnp.dtype("float32" if jnp.issubdtype(tensor.dtype, jnp.floating) else tensor.dtype)
        chunks = _chunk_shape(tensor, stored.itemsize)
        metadata = {"compressor": {"id": "zstd", "level": 1}, "chunks": chunks}
        array = ts.open(
            zarr_spec(folder, name) | {"metadata": metadata, "create": True, "store_data_equal_to_fill_value": True},
            dtype=ts.dtype(stored.name),
            shape=tensor.shape,
        ).result()
        for layer in range(tensor.shape[0]) if tensor.stacked else (None,):
            target, values = (array, tensor.read(None)) if layer is None else (array[layer], tensor.read(layer))
            for part in _parts(values.shape, chunks[len(chunks) - values.ndim :]):
                target[part].write(values[part].astype(stored)).result()
            del values
    (folder / "_METADATA").write_text(json.dumps(_tree_metadata(tensors)))


def open_store(folder: AnyPath) -> dict[str, Tensor]:
    """The tensors of an Orbax tree by dotted names, of which nothing is read yet.

    Raises:
      UserError: where it is none, or a part of a tensor is not there.
    """
    try:
        keys = [key.decode() for key in ts.KvStore.open(_kvstore(folder)).result().list().result()]
        names = sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))
        opening = [ts.open(zarr_spec(folder, name), open=True, read=True) for name in names]
        arrays = {name: array.result() for name, array in zip(names, opening, strict=True)}
    except (ValueError, OSError) as error:
        if isinstance(folder, Url) and is_of_the_store(error):
            raise explained(folder, error) from error
        raise UserError(f"{folder} cannot be read ({first_line(error)}): it is damaged or no checkpoint") from error
    if not arrays:
        raise UserError(f"{folder} holds no tensors: it is no checkpoint of Orbax, or it is damaged")
    _check_parts(folder, keys, arrays)
    return {name: stored_tensor(array, name) for name, array in arrays.items()}


def stored_tensor(array: Any, name: str) -> Tensor:
    """An open array of tensorstore as a tensor; `name` is for the error where it cannot be read."""

    def read(layer: int | None) -> np.ndarray:
        try:
            return (array if layer is None else array[layer]).read().result()
        except ValueError as error:
            raise UserError(f"{name} cannot be read ({first_line(error)}): the checkpoint is damaged") from error

    return Tensor(tuple(array.shape), array.dtype.name, read, STACK in name.split("."))


def check_parts(where: str, parts: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError if the parts of a tensor that are there are not as many as it has, both given by name."""
    lost = [
        f"{name} has {there} of {all_of_it} parts" for name, (there, all_of_it) in parts.items() if there < all_of_it
    ]
    if lost:
        more = f"; {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise UserError(f"{where} is damaged: {'; '.join(lost[:SHOWN])}{more}")


def parts_of(array: Any) -> int:
    """How many chunks an open array of tensorstore is stored in."""
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for a scalar.
    return math.prod(-(-size // part) for size, part in zip(array.shape, chunk, strict=True))


def first_line(error: BaseException) -> str:
    """Another library's message, as much as a line of ours bears."""
    return str(error).strip().splitlines()[0][:LONGEST]


def _check_parts(folder: AnyPath, keys: list[str], arrays: Mapping[str, Any]) -> None:
    there = collections.Counter(key.rpartition("/")[0] for key in keys)
    # Each array has its .zarray beside its parts.
    check_parts(str(folder), {name: (there[name] - 1, parts_of(array)) for name, array in arrays.items()})


def zarr_spec(folder: AnyPath, name: str) -> dict[str, Any]:
    """Tensorstore's description of the array of a dotted name in a tree."""
    if isinstance(folder, Url):
        # Each array is read or written once: what tensorstore kept of it would only take memory.
        return {"driver": "zarr", "kvstore": (folder / name).spec(), "cache_pool": {"total_bytes_limit": 0}}
    return {"driver": "zarr", "kvstore": _kvstore(folder) | {"path": name + "/"}}


def _kvstore(folder: AnyPath) -> dict[str, Any]:
    if isinstance(folder, Url):
        return folder.spec()
    return {"driver": "ocdbt", "base": folder.absolute().as_uri() + "/"}


def _chunk_shape(tensor: Tensor, itemsize: int) -> list[int]:
    """A layer of a stack, halved along its longest axis until it is small enough."""
    chunk = [1, *tensor.shape[1:]] if tensor.stacked else list(tensor.shape)
    while math.prod(chunk) * itemsize > LARGEST_CHUNK:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk


def _parts(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The slices that chunks are; one of nothing for a scalar."""
    axes = [
        [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for size, step in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*axes)


def _tree_metadata(names: Iterable[str]) -> dict[str, Any]:
    """Orbax's description of a tree: nested dictionaries of arrays."""
    tree = {}
    for name in names:
        path = name.split(".")
        keys = [{"key": key, "key_type": 2} for key in path]  # 2: a key of a dictionary.
        tree[str(tuple(path))] = {
            "key_metadata": keys,
            # Orbax restores jax arrays only with a sharding, which depends on the devices of the reader.
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
