"""Tensors that are read on demand, and how tensors of another format map to our parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from alignment_gap.errors import UserError

# An error line names this many problems, and counts the rest.
SHOWN = 4
# A parameter with this part in its name has the layers on its first axis.
STACK = "layers"


class Tensor(NamedTuple):
    """A tensor of a checkpoint; nothing is loaded yet.

    Attributes:
      shape: its whole shape.
      dtype: name of its dtype, such as "float32" or "bfloat16".
      read: `read(None)` loads the whole tensor; if it is `stacked`, `read(i)` loads slice i of its first axis.
      stacked: whether its first axis is the layers, which are then read and written one by one.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int | None], np.ndarray]
    stacked: bool = False


class Entry(NamedTuple):
    """How another format stores one of our parameters.

    Attributes:
      names: names of the tensors in that format: one, or one for each layer.
      shape: shape of each of these tensors.
      ours: converts such a tensor to our parameter, or to one layer of it.
      theirs: the inverse of `ours`.
      per_layer: whether the format has a tensor for each layer.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray], np.ndarray]
    per_layer: bool = False


Entries = Mapping[str, Entry]


def shapes_of(params: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree of (abstract) parameters by dotted names."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def from_array(array: np.ndarray, *, stacked: bool = False) -> Tensor:
    """An array in memory as a tensor."""
    return Tensor(array.shape, array.dtype.name, lambda i: array if i is None else array[i], stacked)


def check_shapes(
    where: str,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    ignored: Collection[str] = (),
) -> None:
    """Raises one UserError that names the tensors that are missing, have another shape or are unexpected.

    Args:
      where: path of the checkpoint.
      found: shapes of the checkpoint's tensors.
      wanted: shapes of the model's tensors.
      ignored: names of tensors that may be present and are not used.
    """
    problems = []
    for name in sorted(found.keys() | wanted.keys()):
        if name in ignored or found.get(name) == wanted.get(name):
            continue
        if name not in found:
            problems.append(f"{name} is missing, the model has it in the shape {wanted[name]}")
        elif name not in wanted:
            problems.append(f"{name} of the shape {found[name]} is in no place of the model")
        else:
            problems.append(f"{name} has the shape {found[name]}, the model has {wanted[name]}")
    if problems:
        shown = "; ".join(problems[:SHOWN]) + (f"; {len(problems) - SHOWN} more" if len(problems) > SHOWN else "")
        raise UserError(f"{where} is of another model or damaged: {shown}")


def check_entries(where: str, found: Mapping[str, Tensor], entries: Entries, ignored: Collection[str] = ()) -> None:
    """Checks the tensors of another format, with one UserError for all that do not fit; see `check_shapes`."""
    wanted = {name: entry.shape for entry in entries.values() for name in entry.names}
    check_shapes(where, {name: tensor.shape for name, tensor in found.items()}, wanted, ignored)


def imported(found: Mapping[str, Tensor], entries: Entries) -> dict[str, Tensor]:
    """Our parameters, as tensors converted from another format after `check_entries`; reads nothing yet."""

    def read(entry: Entry, layer: int | None) -> np.ndarray:
        if not entry.per_layer:
            whole = entry.ours(found[entry.names[0]].read(None))
            return whole if layer is None else whole[layer]
        if layer is None:
            return np.stack([entry.ours(found[name].read(None)) for name in entry.names])
        return entry.ours(found[entry.names[layer]].read(None))

    tensors = {}
    for name, entry in entries.items():
        # The shape of the result of `ours`, found with an array that takes no memory.
        part = entry.ours(np.broadcast_to(np.zeros((), np.int8), entry.shape)).shape
        shape = (len(entry.names), *part) if entry.per_layer else part
        dtype = found[entry.names[0]].dtype
        tensors[name] = Tensor(shape, dtype, functools.partial(read, entry), entry.per_layer)
    return tensors


def exported(ours: Mapping[str, Tensor], entries: Entries) -> dict[str, Tensor]:
    """The tensors of another format, converted from our parameters; reads nothing yet."""

    def read(name: str, entry: Entry, layer: int | None, _: int | None) -> np.ndarray:
        return np.ascontiguousarray(entry.theirs(ours[name].read(layer)))

    return {
        theirs: Tensor(
            entry.shape, ours[name].dtype, functools.partial(read, name, entry, i if entry.per_layer else None)
        )
        for name, entry in entries.items()
        for i, theirs in enumerate(entry.names)
    }


def parameter_count(tensors: Mapping[str, Tensor]) -> int:
    """The number of elements in all tensors together."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
