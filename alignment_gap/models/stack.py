"""A stack of equal layers, run as one layer with a leading axis on its parameters; the depth adds no compile time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignment_gap.sharding import constrain

Carry = TypeVar("Carry")
# The name of a projection's output, which remat "dots" keeps.
PRODUCT = "product"


def init_stack(init: Callable[[Array], Any], key: Array, depth: int) -> Any:
    """Parameters of `depth` layers, stacked on a new first axis, named "layers"."""
    stacked = jax.vmap(init)(jax.random.split(key, depth))
    return nn.meta.add_axis(stacked, 0, {nn.PARTITION_NAME: "layers"})


def scan_stack(
    layer: Callable[[Carry, Any, Any], tuple[Carry, Any]], carry: Carry, params: Any, inputs: Any = None, *, config: Any
) -> tuple[Carry, Any]:
    """Runs `layer(carry, layer_params, layer_inputs) -> (carry, layer_outputs)` over the stack.

    Args:
      layer: one layer.
      carry: the first layer's input; each layer passes its result on to the next.
      params: stacked parameters.
      inputs: other inputs of the layers, stacked.
      config: a model's config. `remat` sets what the backward pass recomputes: "none" keeps all activations, "full"
        recomputes them, "dots" keeps matrix products. `scan_unroll` sets how many layers one iteration runs.

    Returns:
      The last carry and the stacked outputs.
    """
    if config.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[config.remat], prevent_cse=False)

    def body(state: Carry, layer_inputs: Any) -> tuple[Carry, Any]:
        state, outputs = layer(jax.tree.map(constrain_stream, state), *layer_inputs)
        return jax.tree.map(constrain_stream, state), outputs

    return jax.lax.scan(body, carry, (params, inputs), unroll=config.scan_unroll)


def decode_stack(
    layer: Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]],
    x: Float[Array, "B K Q D"],
    cache: Any,
    params: Any,
    inputs: Any = None,
    *,
    config: Any,
) -> tuple[Float[Array, "B K Q D"], Any]:
    """Runs `layer(x, cache, index, layer_params, layer_inputs) -> (x, cache)` over the stack.

    The loop carries the cache of all layers, and each layer writes its new entries in place. With the cache as scanned
    inputs and outputs, every token would copy all of it.
    """

    def body(carry: Any, layer_inputs: Any) -> tuple[Any, None]:
        x, cache = carry
        x, cache = layer(constrain_stream(x), cache, *layer_inputs)
        return (constrain_stream(x), cache), None

    depth = jax.tree.leaves(params)[0].shape[0]
    (x, cache), _ = jax.lax.scan(body, (x, cache), (jnp.arange(depth), params, inputs), unroll=config.scan_unroll)
    return x, cache


def constrain_stream(x: Float[Array, "B *K T D"]) -> Float[Array, "B *K T D"]:
    """Shards a residual stream over the mesh: by batch, and by position if the rules shard positions."""
    return constrain(x, "batch", *[None] * (x.ndim - 3), "length", "embed")


REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(PRODUCT),
    ),
}
