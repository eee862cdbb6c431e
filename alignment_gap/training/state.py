"""The training state. It is sharded from the start, whether it is created or restored."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from alignment_gap.models import Policy, abstract_parameters, adapters
from alignment_gap.sharding import LogicalMesh, shardings_of, unbox
from alignment_gap.training.guard import Skipped, nothing_skipped

# The number of compiled functions to keep that make the first state of a run.
_KEPT = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The whole state of a run at a step.

    Attributes:
      step: number of finished steps.
      params: parameters of the network.
      optimizer_state: optimizer state of all parameters.
      copies: earlier parameters by name, for a sampler that lags behind (`make_refresh`) or a reference that moves
        (`make_moving`).
      skipped: the memory of skipped updates.
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
    """Shapes, dtypes and shardings of a state, without allocation; the target of a restore."""
    return _laid_out(jax.eval_shape(lambda params: _build(params, optimizer, copies), abstract_parameters(init)), mesh)


def abstract_params(init: Callable[[Array], Any], mesh: LogicalMesh) -> Any:
    """Shapes, dtypes and shardings of a network's parameters, without allocation."""
    return _laid_out(abstract_parameters(init), mesh)


def abstract_base(policy: Policy, mesh: LogicalMesh, base_dtype: str | None = None) -> Any:
    """As `abstract_params`, for the base of adapters as it is held in memory; see `AdapterConfig.base_dtype`."""
    return _laid_out(adapters.abstract_base(policy, base_dtype), mesh)


def create_state(
    init: Callable[[Array], Any], abstract: TrainState, optimizer: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """Fresh parameters and optimizer state, sharded like `abstract`; each device makes only its own part."""
    return _creating(init, optimizer, _Layout.of(abstract))(key)


def state_from_params(params: Any, abstract: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0 with a copy of the given parameters; a copy, because the update step overwrites its state."""
    return _copying(optimizer, _Layout.of(abstract))(params)


def make_refresh(name: str, every: int, abstract: TrainState) -> Callable[[int, TrainState], TrainState]:
    """A function that sets the copy of this name to the current parameters before every `every`-th step.

    The copy is part of the state, so a killed run continues with the same copy.
    """
    take = jax.jit(
        lambda state: dataclasses.replace(state, copies=state.copies | {name: _copy(state.params)}),
        out_shardings=shardings_like(abstract),
        donate_argnums=0,
    )
    return lambda step, state: take(state) if step % every == 0 else state


def make_moving(name: str, every: int, alpha: float, abstract: TrainState) -> Callable[[int, TrainState], TrainState]:
    """A function that moves the copy of this name every `every` steps: copy <- alpha * parameters + (1 - alpha) * copy.

    TR-DPO, arXiv 2404.09656: alpha = 1 is its hard update, alpha < 1 its soft update. If the last update was skipped,
    the copy does not move. It moves before the next step, so a stopped run continues with the same copy.
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
    """The state with a copy of other parameters under this name, sharded like `abstract`."""
    copy = jax.jit(_copy, out_shardings=shardings_like(abstract.copies[name]))(params)
    return dataclasses.replace(state, copies=state.copies | {name: copy})


def shardings_like(abstract: Any) -> Any:
    """The sharding of every leaf of a tree of abstract or concrete arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


class _Layout(NamedTuple):
    """The shardings of a state's parts, as a hashable key for cached functions that make a state."""

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


# A study starts many runs of one network; they share these functions.
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
