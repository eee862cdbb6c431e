"""Rotary positions (2104.09864), with the scalings that pretrained checkpoints use to extend their context."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignment_gap.errors import UserError

SCALINGS = ("none", "linear", "llama3")


class Rotation(NamedTuple):
    """Cosines and sines of the angle of each position and each pair that is turned; all heads share them."""

    cos: Float[Array, "*B T 1 half"]
    sin: Float[Array, "*B T 1 half"]


def check(config: Any) -> None:
    """Raises UserError if a decoder's scaling settings contradict each other."""
    if config.rope_scaling == "none" and config.rope_scaling_factor != 1:
        raise UserError(
            f"DecoderConfig.rope_scaling_factor is {config.rope_scaling_factor} without a scaling: "
            "set rope_scaling to linear or llama3"
        )
    if config.rope_high_frequency_factor <= config.rope_low_frequency_factor:
        raise UserError(
            f"DecoderConfig.rope_high_frequency_factor is {config.rope_high_frequency_factor}: "
            f"it must be above rope_low_frequency_factor={config.rope_low_frequency_factor}"
        )


def frequencies(config: Any, *, local: bool = False) -> Float[np.ndarray, " half"]:
    """Radians per token for each pair that is turned, float64: base^(-2i/size), scaled as the decoder's config sets.

    The size is that of the head, or of the part of it that is turned.

    Args:
      config: a `DecoderConfig`.
      local: whether the layer has a sliding window; such layers may have a base of their own, without scaling.
    """
    base = (config.rope_local_base if local else None) or config.rope_base
    size = config.rotary_size or config.head_size
    plain = base ** (-2.0 * np.arange(size // 2) / size)
    if config.rope_scaling == "none" or (local and config.rope_local_base):
        return plain
    slow = plain / config.rope_scaling_factor
    if config.rope_scaling == "linear":
        return slow
    # Llama 3.1: pairs with fewer turns than `low` in the original context are slowed in full, pairs with more than
    # `high` are not, and pairs between are interpolated.
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    turns = config.rope_original_length * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * plain + (1 - kept) * slow


def rotation(positions: Int[Array, "*B T"], frequencies: Float[np.ndarray, " half"]) -> Rotation:
    """The rotation that turns pair i by position * frequencies[i] radians; float32."""
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "*B T H D"], turn: Rotation) -> Float[Array, "*B T H D"]:
    """Turns the pairs (i, i + half) of each head, and leaves what is after them; computed in float32."""
    half = turn.cos.shape[-1]
    first, second, rest = (part.astype(jnp.float32) for part in jnp.split(x, (half, 2 * half), axis=-1))
    turned = [first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin]
    return jnp.concatenate([*turned, rest], axis=-1).astype(x.dtype)
