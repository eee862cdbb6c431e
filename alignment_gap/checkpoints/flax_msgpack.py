"""Flax's msgpack files: finds the arrays without loading them."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import msgpack
import numpy as np

from alignment_gap.checkpoints.layout import first_line
from alignment_gap.checkpoints.tensors import Tensor
from alignment_gap.errors import UserError

# Enough bytes for any key, number or list between arrays, and for the head of an array.
SMALL = 2**16
# Flax's extension types.
ARRAY, NUMPY_SCALAR = 1, 3
# Flax stores an array above 2^30 bytes as a dictionary with this key.
CHUNKED = "__msgpack_chunked_array__"
# The exceptions from reading a truncated file or one of another format.
_DAMAGE = (ValueError, TypeError, IndexError, KeyError, struct.error, msgpack.UnpackException)
# For the first byte of an extension: the size of its length field, or its fixed length.
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_MAPS = {0xDE: ">H", 0xDF: ">I"}


def is_flax_file(path: Path) -> bool:
    """Whether a file begins with a dictionary whose first key is a string, as flax's files do."""
    try:
        with path.open("rb") as file:
            return _map_size(file) not in (None, 0) and isinstance(_small(file), str)
    except (OSError, *_DAMAGE):
        return False


def read_tree(path: Path) -> dict[str, Any]:
    """The nested dictionaries of a file, with a `Tensor` for each array; arrays are not loaded.

    Raises:
      UserError: the file is cut short (the message names the array), or has another format.
    """
    try:
        with path.open("rb") as file:
            tree = _value(file, path, "")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}): check the path") from error
    except _DAMAGE as error:
        raise UserError(f"{path} is damaged or no file of flax ({error!r:.100})") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no file of flax: it holds no dictionary")
    return tree


def _value(file: BinaryIO, path: Path, name: str) -> Any:
    size = _map_size(file)
    if size is not None:
        tree = {}
        for _ in range(size):
            key = _small(file)
            tree[key] = _value(file, path, f"{name}.{key}".removeprefix("."))
        return _joined(tree) if CHUNKED in tree else tree
    return _extension(file, path, name) if _peek(file) in _EXTENSIONS | _FIXED_EXTENSIONS else _small(file)


def _map_size(file: BinaryIO) -> int | None:
    """Reads the header of a dictionary and returns its size; returns None if no dictionary starts here."""
    first = _peek(file)
    if first & 0xF0 == 0x80:
        file.read(1)
        return first & 0x0F
    if first not in _MAPS:
        return None
    form = _MAPS[first]
    file.read(1)
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _peek(file: BinaryIO) -> int:
    byte = file.read(1)
    if not byte:
        raise ValueError("it is cut short")
    file.seek(-1, 1)
    return byte[0]


def _small(file: BinaryIO) -> Any:
    """Reads the small object that starts here."""
    start = file.tell()
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(file.read(SMALL))
    value = unpacker.unpack()
    file.seek(start + unpacker.tell())
    return value


def _extension(file: BinaryIO, path: Path, name: str) -> Any:
    """The array or scalar of an extension, as a `Tensor`; skips its bytes."""
    first = file.read(1)[0]
    size = _FIXED_EXTENSIONS.get(first) or int.from_bytes(file.read(_EXTENSIONS[first]), "big")
    kind, start = file.read(1)[0], file.tell()
    there = path.stat().st_size - start
    if there < size:
        raise UserError(
            f"{path} is cut short: {name} has {there} of its {size} bytes, and everything after it is missing"
        )
    if kind not in (ARRAY, NUMPY_SCALAR):
        raise UserError(f"{path}: {name} is of flax's extension type {kind}, which is no array")
    unpacker = msgpack.Unpacker()
    unpacker.feed(file.read(min(size, SMALL)))
    if unpacker.read_array_header() != 3:
        raise UserError(f"{path} is damaged: {name} is no array of flax")
    shape, dtype = tuple(unpacker.unpack()), unpacker.unpack()
    # The rest is the length of the array's bytes, then the bytes.
    length = np.dtype(jnp.dtype(dtype)).itemsize * int(np.prod(shape, dtype=np.int64))
    data = start + size - length
    if data < start + unpacker.tell():
        raise UserError(f"{path} is damaged: {name} has {size} bytes, its shape {shape} takes more")
    file.seek(start + size)
    return Tensor(shape, jnp.dtype(dtype).name, partial(_read, path, data, shape, dtype))


def _read(path: Path, start: int, shape: tuple[int, ...], dtype: str, layer: int | None) -> np.ndarray:
    array = np.fromfile(path, jnp.dtype(dtype), int(np.prod(shape, dtype=np.int64)), offset=start).reshape(shape)
    return array if layer is None else array[layer]


def _joined(tree: dict[str, Any]) -> Tensor:
    """The array that flax split into flat chunks."""
    shape = tuple(tree["shape"][str(i)] for i in range(len(tree["shape"])))
    pieces = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]

    def read(layer: int | None) -> np.ndarray:
        array = np.concatenate([piece.read(None) for piece in pieces]).reshape(shape)
        return array if layer is None else array[layer]

    return Tensor(shape, pieces[0].dtype, read)
