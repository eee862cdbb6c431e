"""Rows of tokens with lengths: how several become one row without gaps."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int


def join(parts: list[tuple[Int[Array, "B _S"], Int[Array, "B"]]]) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """Concatenates ragged rows without gaps; T is the sum of the parts' sizes, and the rest of a row is 0."""
    batch, size = len(parts[0][1]), sum(tokens.shape[1] for tokens, _ in parts)
    joined = jnp.zeros((batch, size), parts[0][0].dtype)
    offset = jnp.zeros((batch,), parts[0][1].dtype)
    rows = jnp.arange(batch)[:, None]
    for tokens, lengths in parts:
        position = jnp.arange(tokens.shape[1])
        target = jnp.where(position < lengths[:, None], offset[:, None] + position, size)
        joined = joined.at[rows, target].set(tokens, mode="drop")
        offset += lengths
    return joined, offset


def column(token: int, rows: int, dtype: Any) -> tuple[Int[Array, "B 1"], Int[Array, "B"]]:
    """The same single token in every row."""
    return jnp.full((rows, 1), token, dtype), jnp.ones((rows,), jnp.int32)
