"""Maps T5X's tree of T5 v1.1 to ours: the names are the same, except for layers, joined heads and the logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from alignment_gap.checkpoints.formats import Foreign, model_shapes
from alignment_gap.checkpoints.tensors import STACK, Entries, Entry, Tensor
from alignment_gap.errors import UserError
from alignment_gap.models import ModelConfig, T5Config

# The prefix of parameters in T5X's state; the optimizer's state has the prefix "state.".
TARGET = "target."
OUTPUT, LOGITS = "output_embedder.embedding", "decoder.logits_dense.kernel"
# If T5X scans over layers, their axis is the second axis of each parameter.
SCAN_AXIS = 1


def t5_foreign(path: Path, tensors: Mapping[str, Tensor]) -> Foreign:
    """The T5 network from the tensors of T5X's `target`; raises UserError if they are no T5 v1.1."""
    tensors = {name.removeprefix(TARGET): t for name, t in tensors.items() if name.startswith(TARGET)}
    if any("relative_posemb" in name for name in tensors):
        raise UserError(
            f"{path} has a relative position bias in each layer, like T5X's scalable T5, but T5 here shares one "
            "for all layers: import a checkpoint of T5X's t5_1_1"
        )
    scanned = any(name.startswith("encoder.layers.") for name in tensors)
    config = _config(path, tensors, scanned)
    return Foreign(config, tensors, t5_entries(config, scanned=scanned))


def t5_entries(model: ModelConfig, *, scanned: bool = False) -> Entries:
    """How T5X stores each parameter of a T5: one tensor for each layer or, if `scanned`, one for all layers."""
    if not isinstance(model, T5Config):
        raise UserError(f"the network is a {model.architecture}: T5X's format is for T5, choose another format")
    entries = {}
    for name, shape in model_shapes(model).items():
        if name == OUTPUT:
            entries[name] = Entry((LOGITS,), shape[::-1], np.transpose, np.transpose)
        elif f".{STACK}." not in name:
            entries[name] = Entry((name,), shape, np.asarray, np.asarray)
        elif scanned:
            entries[name] = _scanned(name, shape)
        else:
            names = tuple(name.replace(f".{STACK}.", f".{STACK}_{i}.") for i in range(shape[0]))
            joined = _joined(name, shape[1:])
            entries[name] = Entry(
                names, joined, partial(_reshape, shape[1:]), partial(_reshape, joined), per_layer=True
            )
    return entries


def _scanned(name: str, shape: tuple[int, ...]) -> Entry:
    """The entry of a tensor for all layers; in T5X, the axis of layers is not the first."""
    joined = _joined(name, shape[1:])
    their_shape = (joined[0], shape[0], *joined[1:])

    def ours(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, SCAN_AXIS, 0).reshape(shape)

    def theirs(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array.reshape(shape[0], *joined), 0, SCAN_AXIS)

    return Entry((name,), their_shape, ours, theirs)


def _reshape(shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    return array.reshape(shape)


def _joined(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A layer's shape with heads and head size joined: the last axis of query, key and value, the first of out."""
    if len(shape) < 3:
        return shape
    return (shape[0] * shape[1], shape[2]) if ".out." in name else (shape[0], shape[1] * shape[2])


def _config(path: Path, tensors: Mapping[str, Tensor], scanned: bool) -> T5Config:
    """The config, from the tensors' shapes. It keeps the default largest relative distance, 128, as T5X always has."""
    first = "encoder.layers" if scanned else "encoder.layers_0"
    sized = {
        "embedding": "token_embedder.embedding",
        "buckets": "encoder.relpos_bias.rel_embedding",
        "query": f"{first}.attention.query.kernel",
        "mlp": f"{first}.mlp.wi_0.kernel",
    }
    missing = [name for name in sized.values() if len(getattr(tensors.get(name), "shape", ())) < 2]
    if missing:
        raise UserError(
            f"{path} is no T5 v1.1 of T5X: it has no {', '.join(missing)} in its target; it has "
            f"{', '.join(sorted(tensors)[:3]) or 'nothing'}"
        )
    shapes = {key: tensors[name].shape for key, name in sized.items()}
    vocabulary_size, width = shapes["embedding"]
    heads, buckets = shapes["buckets"]
    if shapes["query"][-1] % heads:
        raise UserError(
            f"{path} is damaged: {sized['query']} has the shape {shapes['query']}, which {heads} heads, the rows of "
            f"{sized['buckets']}, do not divide"
        )
    return T5Config(
        vocabulary_size=vocabulary_size,
        width=width,
        encoder_layers=_depth(tensors, "encoder", scanned),
        decoder_layers=_depth(tensors, "decoder", scanned),
        heads=heads,
        head_size=shapes["query"][-1] // heads,
        mlp_width=shapes["mlp"][-1],
        relative_position_buckets=buckets,
        tied_embeddings=LOGITS not in tensors,
    )


def _depth(tensors: Mapping[str, Tensor], stack: str, scanned: bool) -> int:
    if scanned:
        scale = tensors.get(f"{stack}.layers.pre_mlp_layer_norm.scale")
        return scale.shape[SCAN_AXIS] if scale is not None and len(scale.shape) > SCAN_AXIS else 1
    layers = [int(found[1]) for name in tensors if (found := re.match(rf"{stack}\.layers_(\d+)\.", name))]
    return max(layers, default=0) + 1
