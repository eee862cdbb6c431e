"""Kernels of the base of adapters in int8, and keys and values of prompts: about half of their bfloat16 bytes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

INT8 = "int8"
# The largest value; -128 stays unused, so that the values are symmetric.
_LARGEST = 127.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """The kernel values * scale; it replaces a kernel W in a policy's parameters. A stack of layers stacks each part.

    Attributes:
      values: int8 [*inputs, *outputs]. They come first, because flax compares the first leaf's shape with the layer's.
      scale: float32 [*outputs].
    """

    values: Any
    scale: Any

    def astype(self, dtype: Any) -> Quantized:
        """Itself: the product casts the values to the dtype of its input, in which each of them is exact."""
        return self

    def dequantized(self) -> Float[Array, "L *shape"]:
        """The kernels of a stack of layers, in float32."""
        return self.values.astype(jnp.float32) * _over_inputs(self.scale, self.values.ndim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Keys or values of cached positions: values * scale, with a scale for each position and head.

    Attributes:
      values: int8 [*B, S, C].
      scale: float32 [*B, S].
    """

    values: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the keys or values."""
        return self.values.shape


def quantize_rows(rows: Float[Array, "*B S C"]) -> QuantizedRows:
    """Keys or values in int8: round(row / scale) with scale = max |row| / 127 for each position and head."""
    wide = rows.astype(jnp.float32)
    scale = _scale(jnp.abs(wide).max(axis=-1))
    return QuantizedRows(jnp.round(wide / scale[..., None]).astype(jnp.int8), scale)


def quantize(kernel: Float[Array, "L *shape"], inputs: int) -> Quantized:
    """The kernels of a stack of layers in int8: round(W / scale) with scale = max |W| / 127 for each output.

    Args:
      kernel: float32 [L, *inputs, *outputs].
      inputs: number of input axes.
    """
    scale = _scale(jnp.abs(kernel).max(axis=tuple(range(1, 1 + inputs))))
    return Quantized(jnp.round(kernel / _over_inputs(scale, kernel.ndim)).astype(jnp.int8), scale)


def rounded(kernel: Any, inputs: int) -> Float[Array, "L *shape"]:
    """Kernels [L, *inputs, *outputs] rounded to the values that int8 can hold; float32."""
    return quantize(jnp.asarray(kernel), inputs).dequantized()


def is_quantized(leaf: Any) -> bool:
    """Whether a node of parameters is a kernel in int8."""
    return isinstance(leaf, Quantized)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def quantized_product(
    x: Array, values: Int8[Array, "*shape"], scale: Float[Array, "*outputs"], dimensions: Any, precision: Any = None
) -> Array:
    """x times values * scale, for `layers.projection`; the scale multiplies the product, so only int8 is read.

    The product has the dtype of x, as that of a plain kernel: so do the parts of it that devices sum up. The kernel is
    not trained. The gradient of x keeps only the int8 values, not a copy of them in the dtype of x.
    """
    result = jax.lax.dot_general(x, values.astype(x.dtype), dimensions, precision)
    return (result.astype(jnp.float32) * scale).astype(x.dtype)


def _forward(x: Array, values: Array, scale: Array, dimensions: Any, precision: Any) -> tuple[Array, Any]:
    return quantized_product(x, values, scale, dimensions, precision), (values, scale)


def _backward(dimensions: Any, precision: Any, residuals: Any, gradient: Array) -> tuple[Array, None, None]:
    values, scale = residuals
    inputs = len(dimensions[0][1])
    rows, outputs = gradient.ndim - scale.ndim, tuple(range(inputs, values.ndim))
    scaled = (gradient.astype(jnp.float32) * scale).astype(gradient.dtype)
    contracted = ((tuple(range(rows, gradient.ndim)), outputs), ((), ()))
    return jax.lax.dot_general(scaled, values.astype(gradient.dtype), contracted, precision), None, None


quantized_product.defvjp(_forward, _backward)


def _scale(largest: Array) -> Array:
    """The scale of numbers whose largest magnitude is given; 1 if they are all 0."""
    return jnp.where(largest == 0, 1.0, largest / _LARGEST)


def _over_inputs(scale: Array, axes: int) -> Array:
    """The scales [L, *outputs] with an axis of size 1 for each input axis of stacked kernels of `axes` axes."""
    return jnp.expand_dims(scale, tuple(range(1, 1 + axes - scale.ndim)))
