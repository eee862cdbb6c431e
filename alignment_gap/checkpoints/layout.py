"""Checkpoints on disk in Orbax's layout, read and written tensor by tensor, never whole in memory.

RUN/tokenizer/           the tokenizer files that came with imported parameters; runs that start from them copy them
RUN/checkpoints/STEP/
  params/                the parameters, as `Checkpoints` writes them: an OCDBT store with a zarr array for each
  optimizer/             the optimizer's state, in training runs only
  _CHECKPOINT_METADATA   Orbax's metadata, with the network as custom metadata

In a bucket, each array is its own zarr store. The metadata are written last, so a step with metadata is complete.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from alignment_gap.folders import AnyPath, read_json
from alignment_gap.storage import Url, explained, is_of_the_store

CHECKPOINTS, PARAMS, NETWORK, TOKENIZER = "checkpoints", "params", "network", "tokenizer"
METADATA = "_CHECKPOINT_METADATA"
# A model's own settings for sampling, among its tokenizer files.
GENERATION = "generation_config.json"
# The custom metadata with this name hold digests, to compare with the data that is read.
DIGESTS = "digests"
# The longest part of another library's message that our error lines quote.
LONGEST = 160
# Bytes of an array's largest chunk. A device reads at least one chunk to restore its part.
LARGEST_CHUNK = 2**26
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class Stored(NamedTuple):
    """An open checkpoint; nothing is loaded yet.

    Attributes:
      folder: folder of the step.
      network: the network that it holds; None if the checkpoint does not record it.
      tensors: its parameters by dotted names.
    """

    folder: AnyPath
    network: Network | None
    tensors: dict[str, Tensor]


def find_checkpoint(path: AnyPath, step: int | None = None) -> AnyPath:
    """The folder of a step; the last step by default.

    Args:
      path: a run's folder, its checkpoints/, or the step's folder itself.
      step: the step; None for the last.

    Raises:
      UserError: the checkpoint does not exist.
    """
    if (path / PARAMS).is_dir():
        return path
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    steps = complete_steps(folder)
    if not steps:
        raise UserError(
            f"{path} has no complete checkpoint: give the folder of a training job, or of what `alignment-gap "
            "checkpoint import` made of another library's checkpoint"
        )
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"{folder} has no checkpoint of step {step}: choose one of {there}, or none for the last")
    return folder / str(steps[-1] if step is None else step)


def complete_steps(folder: AnyPath) -> list[int]:
    """The steps of the complete checkpoints in a run's checkpoints/, in order; empty if the folder does not exist."""
    if isinstance(folder, Url):
        return sorted(int(path.parent.name) for path in folder.glob(f"*/{METADATA}") if path.parent.name.isdigit())
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def tokenizer_of(folder: AnyPath) -> AnyPath | None:
    """The folder of tokenizer files in the run of a step's folder; None if it does not exist."""
    tokenizer = folder.parent.parent / TOKENIZER
    return tokenizer if tokenizer.is_dir() else None


def end_ids(tokenizer: AnyPath | None, eos_id: int) -> tuple[int, ...]:
    """The ids that end an answer: the vocabulary's end id, then those that generation_config.json names beside it.

    The turns of an instruction-tuned model may end with another token than its texts. Raises UserError if the file is
    not JSON, or names something else than ids.
    """
    if tokenizer is None or not (tokenizer / GENERATION).exists():
        return (eos_id,)
    named = read_json(tokenizer / GENERATION, remedy="fetch the file again").get("eos_token_id")
    further = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(each, int) and each >= 0 for each in further):
        raise UserError(f"{tokenizer / GENERATION} has eos_token_id={named!r}: give a token id, or a list of them")
    return tuple(dict.fromkeys((eos_id, *further)))


def pad_token(tokenizer: AnyPath | None, default: int | None = None) -> int | None:
    """Reads the padding id from a model's config.json; returns `default` if the folder has no such file.

    A reward model of transformers reads the last token that is not this one.
    """
    if tokenizer is None or not (tokenizer / "config.json").exists():
        return default
    return read_json(tokenizer / "config.json", remedy="import the checkpoint again").get("pad_token_id")


def read_network(folder: AnyPath) -> Network | None:
    """The network that a step's checkpoint records; None for an old checkpoint that does not record it."""
    values = _said(folder, NETWORK)
    return from_json(values) if values else None


def read_digest(folder: AnyPath) -> str | None:
    """The `params_digest` that a step's checkpoint records; None for an old checkpoint that does not record it.

    For adapters, the digest covers the adapters, their settings and their base.
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
    """As `read_network`, but raises UserError if the checkpoint does not record its network."""
    network = read_network(folder)
    if network is None:
        raise UserError(
            f"{folder} does not say what network it holds, because it is old: "
            "give MODEL, the model that it was trained as"
        )
    return network


def open_checkpoint(path: AnyPath, step: int | None = None) -> Stored:
    """Opens a checkpoint: its network, and its parameters to read one by one. Arguments are as in `find_checkpoint`."""
    folder = find_checkpoint(path, step)
    return Stored(folder, read_network(folder), open_store(folder / PARAMS))


def watched(stored: Stored) -> tuple[Stored, Callable[[], None]]:
    """The same checkpoint, and a check of its parameters and network against the digests that it stores.

    The check reads the parts that nobody read. It raises UserError if a digest differs.
    """
    digest, said = TensorsDigest(stored.tensors, as_float32=False), _said(stored.folder, DIGESTS) or {}

    def check() -> None:
        wanted = {PARAMS: digest.value, NETWORK: lambda: json_digest(_said(stored.folder, NETWORK))}
        # An old checkpoint has no digests.
        changed = [name for name, found in wanted.items() if name in said and said[name] != found()]
        if changed:
            raise UserError(
                f"{stored.folder} is damaged ({' and '.join(changed)} are not what was saved): take another step"
            )

    return stored._replace(tensors=digest.tensors), check


def write_checkpoint(run: Path, step: int, network: Network, tensors: Mapping[str, Tensor]) -> Path:
    """Writes parameters as the checkpoint of a step, for `Checkpoints` to restore; it appears when it is complete.

    Only one tensor, or one layer of a stacked tensor, is in memory at a time, plus the libraries' buffers. Floating
    dtypes become float32, the dtype of parameters.

    Args:
      run: the folder that will contain checkpoints/.
      step: step of the checkpoint.
      network: the network that it holds.
      tensors: its parameters by dotted names.

    Returns:
      The checkpoint's folder.

    Raises:
      UserError: there already is a checkpoint of this step.
    """
    folder = run / CHECKPOINTS / str(step)
    if folder.exists():
        raise UserError(f"{folder} exists already: give another folder, or remove it")
    # Orbax recognises an unfinished checkpoint by this name.
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
    """Writes tensors as one Orbax tree, for `open_store` and Orbax to read; floating dtypes become float32."""
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
    """Opens the tensors of an Orbax tree, by dotted names; reads no values yet.

    Raises:
      UserError: the folder is no Orbax tree, or a part of a tensor is missing.
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
    """An open tensorstore array as a tensor; if reading fails, the error gives `name`."""

    def read(layer: int | None) -> np.ndarray:
        try:
            return (array if layer is None else array[layer]).read().result()
        except ValueError as error:
            raise UserError(f"{name} cannot be read ({first_line(error)}): the checkpoint is damaged") from error

    return Tensor(tuple(array.shape), array.dtype.name, read, STACK in name.split("."))


def check_parts(where: str, parts: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError if a tensor lacks parts; `parts` maps its name to (parts present, parts in all)."""
    lost = [
        f"{name} has {there} of {all_of_it} parts" for name, (there, all_of_it) in parts.items() if there < all_of_it
    ]
    if lost:
        more = f"; {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
        raise UserError(f"{where} is damaged: {'; '.join(lost[:SHOWN])}{more}")


def parts_of(array: Any) -> int:
    """The number of chunks of an open tensorstore array."""
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for a scalar.
    return math.prod(-(-size // part) for size, part in zip(array.shape, chunk, strict=True))


def first_line(error: BaseException) -> str:
    """The start of another library's message, to quote in our error line."""
    return str(error).strip().splitlines()[0][:LONGEST]


def _check_parts(folder: AnyPath, keys: list[str], arrays: Mapping[str, Any]) -> None:
    there = collections.Counter(key.rpartition("/")[0] for key in keys)
    # Each array's folder has a .zarray in addition to the parts.
    check_parts(str(folder), {name: (there[name] - 1, parts_of(array)) for name, array in arrays.items()})


def zarr_spec(folder: AnyPath, name: str) -> dict[str, Any]:
    """The tensorstore spec of an array in a tree, by its dotted name."""
    if isinstance(folder, Url):
        # Each array is read or written once, so a tensorstore cache would only take memory.
        return {"driver": "zarr", "kvstore": (folder / name).spec(), "cache_pool": {"total_bytes_limit": 0}}
    return {"driver": "zarr", "kvstore": _kvstore(folder) | {"path": name + "/"}}


def _kvstore(folder: AnyPath) -> dict[str, Any]:
    if isinstance(folder, Url):
        return folder.spec()
    return {"driver": "ocdbt", "base": folder.absolute().as_uri() + "/"}


def _chunk_shape(tensor: Tensor, itemsize: int) -> list[int]:
    """The chunk shape: one layer of a stack, or the whole array, halved along the longest axis until small enough."""
    chunk = [1, *tensor.shape[1:]] if tensor.stacked else list(tensor.shape)
    while math.prod(chunk) * itemsize > LARGEST_CHUNK:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk


def _parts(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """The slices of all chunks; one empty tuple for a scalar."""
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
            # To restore jax arrays, Orbax would need a sharding, which depends on the reader's devices.
            "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
