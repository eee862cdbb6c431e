"""Layers that both architectures share: norms, projections, relative positions, attention, MLP."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from alignment_gap.models.low_rank import LowRank
from alignment_gap.models.quantized import Quantized, QuantizedRows, quantize_rows, quantized_product
from alignment_gap.models.stack import PRODUCT
from alignment_gap.sharding import constrain

KeysValues = tuple[Array, Array]
PromptKeysValues = tuple[Array | QuantizedRows, Array | QuantizedRows]
# The value of masked attention logits: far below any real logit, and finite, for rows that are masked everywhere.
MASKED = -1e30


class RMSNorm(nn.Module):
    """Root-mean-square norm without mean or bias, computed in float32.

    Attributes:
      dtype: dtype of the result.
      epsilon: added to the mean square.
      form: "scale" multiplies by a parameter that starts at 1, "one_plus_scale" by 1 + a parameter that starts at 0.
      axis: logical name of the normalised axis.
    """

    dtype: Any = jnp.float32
    epsilon: float = 1e-6
    form: str = "scale"
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The normalised input times a learned scale, in `dtype`."""
        offset = 1.0 if self.form == "one_plus_scale" else 0.0
        initializer = nn.with_logical_partitioning(nn.initializers.constant(1.0 - offset), (self.axis,))
        scale: Any = self.param("scale", initializer, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon) * (scale + offset)).astype(
            self.dtype
        )


class LayerNorm(nn.Module):
    """Layer norm (1607.06450): subtracts the mean, divides by the deviation; computed in float32.

    Attributes:
      dtype: dtype of the result.
      epsilon: added to the variance.
      axis: logical name of the normalised axis.
    """

    dtype: Any = jnp.float32
    epsilon: float = 1e-5
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """The normalised input times a learned scale, plus a learned bias, in `dtype`."""
        one, zero = (
            nn.with_logical_partitioning(nn.initializers.constant(value), (self.axis,)) for value in (1.0, 0.0)
        )
        scale: Any = self.param("scale", one, x.shape[-1:])
        bias: Any = self.param("bias", zero, x.shape[-1:])
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.epsilon)
        return (centred / deviation * scale + bias).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: Array, kernel: Array, dimensions: Any, precision: Any = None) -> Array:
    """`jax.lax.dot_general` over the last axes of `x` and the first axes of `kernel`, for `projection`.

    It has a gradient rule of its own, for two reasons:

    - The kernel's gradient is x^T g, never (g^T x)^T. On a CPU, XLA copies the left factor into its transpose. x is in
      memory already and several projections share it; g would be computed during the copy, at ten times the cost.
    - A kernel that is not trained gets no gradient, so x is not kept for it.
    """
    return jax.lax.dot_general(x, kernel, dimensions, precision)


def _product_forward(x: Any, kernel: Any, *static: Any) -> tuple[Array, tuple[Array | None, Array]]:
    return product(x.value, kernel.value, *static), (x.value if kernel.perturbed else None, kernel.value)


def _product_backward(
    dimensions: Any, precision: Any, residuals: tuple[Array | None, Array], gradient: Array
) -> tuple[Array, Array | None]:
    x, kernel = residuals
    inputs = len(dimensions[0][1])
    rows, outputs = gradient.ndim - (kernel.ndim - inputs), tuple(range(inputs, kernel.ndim))
    batch = tuple(range(rows))
    multiply = functools.partial(jax.lax.dot_general, precision=precision)
    of_x = multiply(gradient, kernel, ((tuple(range(rows, gradient.ndim)), outputs), ((), ())))
    of_kernel = None if x is None else multiply(x, gradient, ((batch, batch), ((), ()))).astype(kernel.dtype)
    return of_x.astype(gradient.dtype), of_kernel


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def _named_product(x: Array, kernel: Array | LowRank | Quantized, dimensions: Any, precision: Any) -> Array:
    """The product with a name for remat, whose policies do not see products inside a custom gradient rule."""
    if not isinstance(kernel, LowRank):
        return checkpoint_name(_product_of(x, kernel, dimensions, precision), PRODUCT)
    low = product(kernel.dropped(x), kernel.a, dimensions, precision)
    delta = product(low, kernel.b, (((low.ndim - 1,), (0,)), ((), ())), precision)
    return checkpoint_name(_product_of(x, kernel.kernel, dimensions, precision) + delta, PRODUCT)


def _product_of(x: Array, kernel: Array | Quantized, dimensions: Any, precision: Any) -> Array:
    if isinstance(kernel, Quantized):
        return quantized_product(x, kernel.values, kernel.scale, dimensions, precision)
    return product(x, kernel, dimensions, precision)


def _cast(x: Any, kernel: Any, bias: Any, *, dtype: Any) -> tuple[Any, ...]:
    """Casts all operands of a projection to the dtype of its computation."""
    x, bias = (each if each is None else jnp.asarray(each, dtype) for each in (x, bias))
    return x, kernel.astype(dtype), bias


def projection(
    features: int | tuple[int, ...],
    axes: tuple[str, ...],
    *,
    inputs: int = 1,
    variance: float = 1.0,
    bias: bool = False,
    dtype: Any,
) -> nn.DenseGeneral:
    """A linear map whose kernel and bias carry logical axis names.

    Args:
      features: size or sizes of the output axes.
      axes: logical names of the kernel's axes, inputs first.
      inputs: number of trailing axes of the input to contract.
      variance: variance of the initial kernel, times fan-in.
      bias: whether to add a bias.
      dtype: dtype of the computation; the parameters are float32.
    """
    initializer = nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal")
    return nn.DenseGeneral(
        features,
        axis=tuple(range(-inputs, 0)),
        use_bias=bias,
        dot_general=_named_product,
        promote_dtype=_cast,  # type: ignore[arg-type]
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(initializer, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[inputs:]),
    )


class MLP(nn.Module):
    """activation(x wi_0) * (x wi_1), or without a gate activation(x wi), projected back by wo.

    T5 v1.1 has a gate with GELU, SwiGLU one with SiLU, GPT-NeoX none.
    """

    width: int
    hidden: int
    activation: Callable[[Array], Array]
    dtype: Any
    gated: bool = True
    bias: bool = False

    def setup(self) -> None:
        """Makes the two or three projections."""
        project = functools.partial(projection, bias=self.bias, dtype=self.dtype)
        if self.gated:
            self.wi_0 = project(self.hidden, ("embed", "mlp"))
            self.wi_1 = project(self.hidden, ("embed", "mlp"))
        else:
            self.wi = project(self.hidden, ("embed", "mlp"))
        self.wo = project(self.width, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies the block to the last axis."""
        hidden = self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x))
        return self.wo(constrain(hidden, "batch", *[None] * (x.ndim - 2), "mlp"))


class Segment(NamedTuple):
    """Keys and values that queries attend to: the prompt's, shared by K responses, or each response's own.

    Attributes:
      keys: [B, G, S, D] if all K rows of a prompt share them, [B, G, K, S, D] if each row has its own. Heads come
        before rows and positions, the order that matrix products need; so decoding does not transpose the cache for
        each token. Shared keys may be in int8.
      values: shaped as the keys.
      mask: True where a query may attend to a key; broadcastable to [B, K, Q, S].
      bias: added to the logits of each head, [H, Q, S], or None.
    """

    keys: Float[Array, "B G *K S D"] | QuantizedRows
    values: Float[Array, "B G *K S D"] | QuantizedRows
    mask: Bool[Array, "#B #K #Q #S"]
    bias: Float[Array, "H Q S"] | None = None


def attend(
    query: Float[Array, "B K Q H D"], segments: Sequence[Segment], *, scale: float, soft_cap: float | None = None
) -> Float[Array, "B K Q H D"]:
    """Softmax attention over the concatenation of segments; the keys of a shared segment are never copied per row.

    H query heads use G key heads, where G divides H (multi-head, grouped or multi-query). Logits and softmax are
    float32. A soft cap bounds the logits before bias and mask.
    """
    batch, rows, length, heads, size = query.shape
    # The query moves from the projection's layout to the cache's. They differ in a loop over tokens.
    query = constrain(query, "batch", None, None, "heads", "kv")
    query = constrain(query, "cache_batch", None, None, "heads", "kv")
    segments = [
        segment._replace(keys=jax.tree.map(_cached, segment.keys), values=jax.tree.map(_cached, segment.values))
        for segment in segments
    ]
    groups = segments[0].keys.shape[1]
    query = query.reshape(batch, rows, length, groups, heads // groups, size).transpose(0, 3, 1, 4, 2, 5) * scale
    logits = []
    # In this order of axes, the logits are as a product of queries and keys gives them. In other orders, XLA multiplies
    # the keys by the few queries of a token and transposes the result, which is slow on a CPU.
    for segment in segments:
        logit = _products(query, segment.keys)
        if soft_cap is not None:
            logit = soft_cap * jnp.tanh(logit / soft_cap)
        if segment.bias is not None:
            logit += segment.bias.reshape(groups, 1, heads // groups, *segment.bias.shape[1:])
        logits.append(jnp.where(segment.mask[:, None, :, None], logit, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
    ends = list(itertools.accumulate(logit.shape[-1] for logit in logits))
    output = jnp.zeros((), query.dtype)
    for segment, weight in zip(segments, jnp.split(weights, ends[:-1], axis=-1), strict=True):
        output += _averages(weight, segment.values, query.dtype)
    output = jnp.reshape(output.transpose(0, 2, 4, 1, 3, 5), (batch, rows, length, heads, size))
    output = constrain(output, "cache_batch", None, None, "heads", "kv")
    return constrain(output, "batch", None, None, "heads", "kv")


def _products(
    query: Float[Array, "B G K h Q D"], keys: Float[Array, "B G *K S D"] | QuantizedRows
) -> Float[Array, "B G K h Q S"]:
    """The products of queries and keys in float32. Each int8 value is exact in the query's dtype; scales come after."""
    if isinstance(keys, QuantizedRows):
        return _products(query, keys.values.astype(query.dtype)) * keys.scale[:, :, None, None, None]
    axes = "bgsd" if keys.ndim == 4 else "bgksd"
    return jnp.einsum(f"bgkhqd,{axes}->bgkhqs", query, keys, preferred_element_type=jnp.float32)


def _averages(
    weights: Float[Array, "B G K h Q S"], values: Float[Array, "B G *K S D"] | QuantizedRows, dtype: Any
) -> Float[Array, "B G K h Q D"]:
    """The values averaged by float32 weights, computed in `dtype`."""
    if isinstance(values, QuantizedRows):
        return _averages(weights * values.scale[:, :, None, None, None], values.values.astype(dtype), dtype)
    axes = "bgsd" if values.ndim == 4 else "bgksd"
    return jnp.einsum(f"bgkhqs,{axes}->bgkhqd", weights.astype(dtype), values)


def _cached(x: Array) -> Array:
    """Shards keys or values as the cache does: those of a segment, or of all layers [L, B, G, K, R, C]; or scales."""
    shared = ("cache_batch", "kv_heads")
    if x.ndim == 3:
        return constrain(x, *shared, "kv_length")
    first = {4: shared, 5: (*shared, None), 6: ("layers", *shared, None)}[x.ndim]
    return constrain(x, *first, "kv_length", "kv")


class RelativePositionBias(nn.Module):
    """T5's learned bias, one for each head and each bucket of the distance from query to key."""

    buckets: int
    max_distance: int
    heads: int
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: Int[Array, "Q"], keys: Int[Array, "S"]) -> Float[Array, "H Q S"]:
        """The float32 bias between these positions."""
        table: Any = self.param(
            "rel_embedding",
            nn.with_logical_partitioning(nn.initializers.normal(1.0), ("heads", "relpos_buckets")),
            (self.heads, self.buckets),
        )
        distance = keys[None, :] - queries[:, None]
        return table[:, relative_position_bucket(distance, self.bidirectional, self.buckets, self.max_distance)]


def relative_position_bucket(
    distance: Int[Array, "*B"], bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "*B"]:
    """T5's bucket for key position minus query position: exact when near, logarithmic to max_distance (1910.10683)."""
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    starts = jnp.asarray(_bucket_starts(buckets, max_distance))
    return offset + jnp.searchsorted(starts, distance, side="right", method="compare_all").astype(distance.dtype)


@functools.cache
def _bucket_starts(buckets: int, max_distance: int) -> np.ndarray:
    """The smallest distance of every bucket except the first, in exact integers.

    A float logarithm may be wrong in its last bit, which would move a start by one. With e = buckets / 2 and
    n = buckets - e, bucket e + i begins at the first d with n log(d/e) / log(max/e) >= i, so d^n >= max^i e^(n-i).
    """
    exact = buckets // 2
    far = buckets - exact
    starts, distance = list(range(1, exact + 1)), exact
    for i in range(1, far):
        while distance**far < max_distance**i * exact ** (far - i):
            distance += 1
        starts.append(distance)
    return np.asarray(starts, np.int32)


def causal_mask(queries: Int[Array, "Q"], keys: Int[Array, "S"], window: int | None = None) -> Bool[Array, "1 1 Q S"]:
    """True where the key is not after the query and, if a window is given, less than `window` tokens before it."""
    distance = queries[:, None] - keys
    mask = distance >= 0
    return (mask if window is None else mask & (distance < window))[None, None]


def embedding(key: Array, vocabulary_size: int, width: int, stddev: float = 1.0) -> nn.LogicallyPartitioned:
    """A normally distributed embedding table [V, D] with its logical axis names."""
    initializer = nn.with_logical_partitioning(nn.initializers.normal(stddev), ("vocab", "embed"))
    return initializer(key, (vocabulary_size, width), jnp.float32)


def prefix_mask(lengths: Int[Array, "B"], size: int) -> Bool[Array, "B 1 1 S"]:
    """True at each prompt's own tokens, for every row and query."""
    return (jnp.arange(size) < lengths[:, None])[:, None, None]


def heads_first(keys: Float[Array, "*B S G C"], values: Float[Array, "*B S G C"]) -> KeysValues:
    """Reorders keys and values from a projection's axes to the axes of a `Segment`."""
    names = ("batch", *[None] * (keys.ndim - 3), "kv_heads", "kv")
    keys, values = constrain(keys, *names), constrain(values, *names)
    return jnp.moveaxis(keys, -2, 1), jnp.moveaxis(values, -2, 1)


def held(keys_values: KeysValues, dtype: str | None) -> PromptKeysValues:
    """A layer's keys and values of the prompts as the cache holds them: in int8, or as they are if `dtype` is None."""
    if dtype is None:
        return keys_values
    # Where they are computed; otherwise XLA moves them to the layout of the cache before it rounds them.
    names = ("batch", "kv_heads", None, "kv")
    keys, values = (jax.tree.map(lambda x: constrain(x, *names[: x.ndim]), quantize_rows(rows)) for rows in keys_values)
    return keys, values


def placed_cache(cache: dict[str, Any]) -> dict[str, Any]:
    """A policy's cache in the layout of a loop over tokens; the prompts' keys and values [L, B, G, P, C] move once.

    All else that a cache holds has one entry for each prompt, such as a mask.
    """
    rest = {name: x for name, x in cache.items() if name not in ("prompt", "responses")}
    names = ("layers", "cache_batch", "kv_heads", "kv_length", "kv")
    return {
        # Scales have all axes but the last one.
        "prompt": jax.tree.map(lambda x: constrain(x, *names[: x.ndim]), cache["prompt"]),
        "responses": tuple(map(_cached, cache["responses"])),
        **{name: constrain(x, "cache_batch", *[None] * (x.ndim - 1)) for name, x in rest.items()},
    }


def of_prompts(cache: dict[str, Any], kept: Int[Array, "N"]) -> dict[str, Any]:
    """The part of a policy's cache that belongs to some of its prompts."""
    stacked = ("prompt", "responses")
    return {
        name: jax.tree.map(lambda x, axis=int(name in stacked): jnp.take(x, kept, axis), part)
        for name, part in cache.items()
    }


def empty_cache(shape: tuple[int, ...], dtype: Any) -> KeysValues:
    """Zeros for the keys and values [L, B, G, K, R, C] of the responses in all layers."""
    empty = _cached(jnp.zeros(shape, dtype))
    return empty, empty


def extend_cache(
    cache: KeysValues, new: KeysValues, layer: Int[Array, ""], step: Int[Array, ""], places: int
) -> tuple[KeysValues, KeysValues]:
    """Writes a layer's new keys and values [B, G, K, 1, C] at `step`.

    Returns the cache, and the layer's first `places` places of it, [B, G, K, places, C].
    """
    index = (layer, 0, 0, 0, step, 0)
    keys, values = (
        jax.lax.dynamic_update_slice(old, _cached(add)[None], index) for old, add in zip(cache, new, strict=True)
    )
    read = (1, *keys.shape[1:4], places, keys.shape[5])
    own_keys, own_values = (jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0, 0), read)[0] for x in (keys, values))
    return (keys, values), (own_keys, own_values)
