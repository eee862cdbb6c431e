"""Functions that are finite, and have finite gradients, at any finite argument."""

from __future__ import annotations

import jax.numpy as jnp

from alignment_gap.losses._shapes import Array, Float

# exp(60) is 1e26; the product with any log-ratio is still finite in float32.
LIMIT = 60.0


def tangent_exp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """exp(x), continued by its tangent above 60: convex and increasing, never infinite."""
    return jnp.exp(jnp.minimum(x, LIMIT)) * (1.0 + jnp.maximum(x - LIMIT, 0.0))


def tangent_expm1(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """exp(x) - 1 without cancellation near 0, continued by its tangent above 60."""
    return jnp.expm1(jnp.minimum(x, LIMIT)) + jnp.exp(LIMIT) * jnp.maximum(x - LIMIT, 0.0)


def log1mexp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """log(1 - exp(x)) for x < 0; x above -1e-7 counts as -1e-7, with a zero gradient."""
    x = jnp.minimum(x, -1e-7)
    near = x > -0.6931472
    # A double where: each branch gets only arguments for which it is accurate.
    return jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))),
    )


def masked_mean(values: Float[Array, "*B T"], mask: Array) -> Float[Array, "*B"]:
    """The mean over the last axis where the mask is true; 0 if the mask is true nowhere."""
    total = jnp.sum(jnp.where(mask, values, 0.0), axis=-1)
    return total / jnp.maximum(jnp.sum(mask, axis=-1).astype(jnp.float32), 1.0)


def masked_sum(values: Float[Array, "*B T"], mask: Array) -> Float[Array, "*B"]:
    """The sum over the last axis where the mask is true."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1)
