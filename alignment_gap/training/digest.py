"""A digest of parameters: the same bits give the same digest, on any mesh."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt


def params_digest(params: Any) -> str:
    """SHA-256 in hexadecimal of every parameter's name, shape, dtype and bits, whatever mesh they are laid out on.

    The bits enter by two checksums of 32 bits each, sums of a hash of each element with its place; sums of integers
    do not depend on their order, so that no device needs the whole of a parameter.
    """
    checksums = jax.device_get(_checksums(params))
    content = [
        [jax.tree_util.keystr(name), list(leaf.shape), str(leaf.dtype), checksum.tolist()]
        for (name, leaf), checksum in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(checksums), strict=True
        )
    ]
    return hashlib.sha256(json.dumps(sorted(content)).encode()).hexdigest()


# One function for all calls, which is traced once for each network.
@jax.jit
def _checksums(params: Any) -> Any:
    return jax.tree.map(_checksum, params)


def _checksum(x: Array) -> UInt[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    # Multipliers of MurmurHash3's finaliser and of the golden ratio.
    sums = [_mix(_mix(place * jnp.uint32(0x9E3779B9) + jnp.uint32(seed)) ^ bits) for seed in (1, 2)]
    return jnp.stack([hashed.sum(dtype=jnp.uint32) for hashed in sums])


def _mix(x: UInt[Array, "*S"]) -> UInt[Array, "*S"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
