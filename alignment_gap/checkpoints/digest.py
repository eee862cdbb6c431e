"""A digest of parameters: equal bits give equal digests, on any mesh, from arrays or from tensors read one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt

from alignment_gap.checkpoints.tensors import Tensor

# The number of elements of a host tensor that are hashed at once.
_AT_ONCE = 2**20


def json_digest(values: Any) -> str:
    """SHA-256, in hexadecimal, of a value that JSON can represent."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def params_digest(params: Any) -> str:
    """SHA-256, in hexadecimal, of every parameter's name, shape, dtype and bits; it does not depend on the mesh.

    Two 32-bit checksums stand for the bits. Each is a sum over the elements of a hash of the element and its index.
    Sums of integers do not depend on the order, so no device needs a whole parameter.
    """
    checksums = jax.device_get(_checksums(params))
    return _digest_of(
        [
            [jax.tree_util.keystr(name), list(leaf.shape), str(leaf.dtype), checksum.tolist()]
            for (name, leaf), checksum in zip(
                jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(checksums), strict=True
            )
        ]
    )


class TensorsDigest:
    """Computes the `params_digest` of tensors while they are read one by one.

    Attributes:
      tensors: the same tensors, to read in place of the given ones.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, as_float32: bool = True) -> None:
        """Watches `tensors`; with `as_float32`, floating dtypes are read as float32."""
        # The checksums of the parts that were read, by name and part; a part that is read again counts once.
        self._checksums: dict[str, dict[int | None, np.ndarray]] = {name: {} for name in tensors}
        self._as_float32 = as_float32
        self.tensors = {name: self._watched(name, tensor) for name, tensor in tensors.items()}

    def value(self) -> str:
        """Returns the digest, after it has read the parts that nobody read."""
        return _digest_of(
            [
                ["".join(f"['{key}']" for key in name.split(".")), list(each.shape), each.dtype, self._total(name)]
                for name, each in self.tensors.items()
            ]
        )

    def _total(self, name: str) -> list[int]:
        tensor, found = self.tensors[name], self._checksums[name]
        if None not in found:
            parts = range(tensor.shape[0]) if tensor.stacked else (None,)
            for part in set(parts) - found.keys():
                tensor.read(part)
        return (found[None] if None in found else sum(found.values(), np.zeros(2, np.uint32))).tolist()

    def _watched(self, name: str, tensor: Tensor) -> Tensor:
        is_cast = self._as_float32 and jnp.issubdtype(tensor.dtype, jnp.floating)
        dtype = "float32" if is_cast else tensor.dtype

        def read(layer: int | None) -> np.ndarray:
            values = tensor.read(layer).astype(dtype, copy=False)
            self._checksums[name][layer] = checksum_of(values, (layer or 0) * values.size)
            return values

        return tensor._replace(dtype=dtype, read=read)


def checksum_of(values: np.ndarray, first: int = 0) -> np.ndarray:
    """The two checksums of a part of an array; `first` is the index of the part's first element in the whole array."""
    flat = np.ascontiguousarray(values).reshape(-1)
    bits, total = flat.view(f"uint{8 * flat.dtype.itemsize}"), np.zeros(2, np.uint32)
    for start in range(0, flat.size, _AT_ONCE):
        part = bits[start : start + _AT_ONCE].astype(np.uint32)
        whole = np.pad(part, (0, _AT_ONCE - len(part)))
        # Indices count modulo 2**32.
        place = np.uint32((first + start) % 2**32)
        total += jax.device_get(_checksum_of_part(whole, place, np.uint32(len(part))))
    return total


@jax.jit
def _checksum_of_part(bits: UInt[Array, "N"], first: UInt[Array, ""], count: UInt[Array, ""]) -> UInt[Array, "2"]:
    index = jax.lax.iota(jnp.uint32, bits.shape[0])
    hashed = _hashed(first + index, bits)
    return jnp.stack([jnp.where(index < count, each, np.uint32(0)).sum(dtype=jnp.uint32) for each in hashed])


def _digest_of(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()


# One function for all calls, so that each network is traced once.
@jax.jit
def _checksums(params: Any) -> Any:
    return jax.tree.map(_checksum, params)


def _checksum(x: Array) -> UInt[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.stack([hashed.sum(dtype=jnp.uint32) for hashed in _hashed(place, bits)])


def _hashed(place: Any, bits: Any) -> list[Any]:
    """Two hashes of each element and its index, all in uint32."""
    # The multipliers come from MurmurHash3's finaliser and from the golden ratio.
    return [_mix(_mix(place * np.uint32(0x9E3779B9) + np.uint32(seed)) ^ bits) for seed in (1, 2)]


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
