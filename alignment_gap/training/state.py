"""What a training step changes, created or restored sharded from the start."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from alignment_gap.models import Policy, abstract_parameters, compute_params
from alignment_gap.sharding import LogicalMesh, shardings_of, unbox
from alignment_gap.training.guard import Skipped, nothing_skipped

# Functions that make the first state of a run and stay compiled.
_KEPT = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run is made of at a step.

    Attributes:
      step: updates done.
      params: of the network.
      optimizer_state: of all parameters.
      copies: earlier parameters by name: of a sampler that lags behind (`make_refresh`), of a reference that moves
        (`make_moving`).
      skipped: the updates that were not made.
    """

    step: Int[Array, ""]
    params: Any
    optimizer_state: Any
    copies: dict[str, Any] = dataclasses.field(default_factory=dict)
    skipped: Skipped = dataclasses.field(default_factory=nothing_skipped)


def abstract_state(
    init: Callable[[Array], Any],
    optimizer: optax.GradientTransformation,
    mesh: LogicalMesh,
    copies: Sequence[str] = (),
) -> TrainState:
    """Shapes, dtypes and shardings of a state, with nothing allocated: the target of a restore."""
    return _laid_out(jax.eval_shape(lambda params: _build(params, optimizer, copies), abstract_parameters(init)), mesh)


def abstract_params(init: Callable[[Array], Any], mesh: LogicalMesh) -> Any:
    """Shapes, dtypes and shardings of a network's parameters, with nothing allocated."""
    return _laid_out(abstract_parameters(init), mesh)


def abstract_base(policy: Policy, mesh: LogicalMesh) -> Any:
    """As `abstract_params`, of the base of adapters, which is held in the dtype of the computation."""
    params = abstract_params(policy.init, mesh)
    return jax.tree.map(
        lambda held, like: jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=like.sharding),
        jax.eval_shape(functools.partial(compute_params, policy), params),
        params,
    )


def create_state(
    init: Callable[[Array], Any], abstract: TrainState, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Fresh parameters and optimizer state, laid out as `abstract` says; each device makes only its own part."""
    return _creating(init, optimizer, _Layout.of(abstract))(key)


def state_from_params(params: Any, abstract: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0 from given parameters, which are copied: the update step overwrites its state in place."""
    return _copying(optimizer, _Layout.of(abstract))(params)


def make_refresh(name: str, every: int, abstract: TrainState) -> Callable[[int, TrainState], TrainState]:
    """Before every `every`-th step the copy of this name takes the current parameters; between them it stays.

    The copy is a part of the state, so that a run which was killed goes on with the very same one.
    """
    take = jax.jit(
        lambda state: dataclasses.replace(state, copies=state.copies | {name: _copy(state.params)}),
        out_shardings=shardings_like(abstract),
        donate_argnums=0,
    )
    return lambda step, state: take(state) if step % every == 0 else state


def make_moving(name: str, every: int, alpha: float, abstract: TrainState) -> Callable[[int, TrainState], TrainState]:
    """After every `every` steps the copy of this name moves: copy <- alpha * parameters + (1 - alpha) * copy.

    TR-DPO, arXiv 2404.09656: alpha of 1 is its hard update, one below 1 its soft update. The copy stays where the last
    update was skipped. It moves before the next step, so that a run which was stopped goes on with the very same one.
    """

    def moved(state: TrainState) -> TrainState:
        copy, is_made = state.copies[name], state.skipped.in_a_row == 0
        copy = jax.tree.map(
            lambda new, old: jnp.where(is_made, new, old), optax.incremental_update(state.params, copy, alpha), copy
        )
        return dataclasses.replace(state, copies=state.copies | {name: copy})

    move = jax.jit(moved, out_shardings=shardings_like(abstract), donate_argnums=0)
    return lambda step, state: move(state) if step and step % every == 0 else state


def with_copy(state: TrainState, name: str, params: Any, abstract: TrainState) -> TrainState:
    """The state whose copy of this name is a copy of other parameters, laid out as `abstract` says."""
    copy = jax.jit(_copy, out_shardings=shardings_like(abstract.copies[name]))(params)
    return dataclasses.replace(state, copies=state.copies | {name: copy})


def shardings_like(abstract: Any) -> Any:
    """The sharding of every leaf of a tree of abstract or concrete arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


class _Layout(NamedTuple):
    """Where the parts of a state lie, as a key of functions that make one."""

    copies: tuple[str, ...]
    leaves: tuple[Any, ...]
    tree: Any

    @classmethod
    def of(cls, abstract: TrainState) -> _Layout:
        leaves, tree = jax.tree.flatten(shardings_like(abstract))
        return cls(tuple(abstract.copies), tuple(leaves), tree)

    @property
    def shardings(self) -> Any:
        return jax.tree.unflatten(self.tree, self.leaves)


# A study starts many runs of one network, which share these functions.
@functools.lru_cache(maxsize=_KEPT)
def _creating(init: Callable[[Array], Any], optimizer: optax.GradientTransformation, layout: _Layout) -> Any:
    return jax.jit(lambda key: unbox(_build(init(key), optimizer, layout.copies)), out_shardings=layout.shardings)


@functools.lru_cache(maxsize=_KEPT)
def _copying(optimizer: optax.GradientTransformation, layout: _Layout) -> Any:
    return jax.jit(lambda params: _build(_copy(params), optimizer, layout.copies), out_shardings=layout.shardings)


def _laid_out(boxed: Any, mesh: LogicalMesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        unbox(boxed),
        shardings_of(boxed, mesh),
    )


def _build(params: Any, optimizer: optax.GradientTransformation, copies: Sequence[str]) -> TrainState:
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), {name: _copy(params) for name in copies}
    )


def _copy(params: Any) -> Any:
    return jax.tree.map(jnp.copy, params)
