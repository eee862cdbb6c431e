"""What a training step changes, created or restored sharded from the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from alignment_gap.sharding import LogicalMesh, shardings_of, unbox


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Step count, parameters and optimizer state."""

    step: Int[Array, ""]
    params: Any
    optimizer_state: Any


def abstract_state(
    init: Callable[[Array], Any], optimizer: optax.GradientTransformation, mesh: LogicalMesh
) -> TrainState:
    """Shapes, dtypes and shardings of a state, with nothing allocated: the target of a restore."""
    return _abstract(lambda: _build(init(jax.random.key(0)), optimizer), mesh)


def abstract_params(init: Callable[[Array], Any], mesh: LogicalMesh) -> Any:
    """Shapes, dtypes and shardings of a network's parameters, with nothing allocated."""
    return _abstract(lambda: init(jax.random.key(0)), mesh)


def create_state(
    init: Callable[[Array], Any], optimizer: optax.GradientTransformation, mesh: LogicalMesh, key: Key[Array, ""]
) -> TrainState:
    """Fresh parameters and optimizer state, each device making only its own part."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(init, optimizer, mesh))
    return jax.jit(lambda key: unbox(_build(init(key), optimizer)), out_shardings=shardings)(key)


def state_from_params(params: Any, abstract: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 from given parameters, which are copied: the update step overwrites its state in place."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda params: _build(jax.tree.map(jnp.copy, params), optimizer), out_shardings=shardings)(params)


def _abstract(build: Callable[[], Any], mesh: LogicalMesh) -> Any:
    boxed = jax.eval_shape(build)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        shardings_of(boxed, mesh),
    )


def _build(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
