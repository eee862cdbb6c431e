"""Where arrays lie: shardings of parameters, optimizer states and batches, and constraints inside of functions."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from alignment_gap.sharding.mesh import LogicalMesh
from alignment_gap.sharding.rules import DECODING, Rules

Function = TypeVar("Function", bound=Callable[..., Any])

# Not flax's own context: under it flax constrains parameters by the names of the stack that they are a part of.
_RULES: contextvars.ContextVar[Rules] = contextvars.ContextVar("logical axis rules", default=())


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], rules: Rules
) -> PartitionSpec:
    """The mesh axes of an array's axes: by the first rule of each name whose mesh axes are free and divide its size.

    Args:
      names: logical axis names; None is never split.
      shape: the array's.
      sizes: of the mesh axes.
      rules: in order of precedence.
    """
    spec: list[Any] = [None] * len(shape)
    open_axes, taken = {i for i, name in enumerate(names) if name}, set[str]()
    for name, target in rules:
        axes = (target,) if isinstance(target, str) else target
        for i in sorted(i for i in open_axes if names[i] == name):
            if axes is None:
                open_axes.remove(i)
            elif not taken & set(axes) and shape[i] % math.prod(sizes[axis] for axis in axes) == 0:
                spec[i] = target
                taken |= set(axes)
                open_axes.remove(i)
    return PartitionSpec(*spec)


def within(mesh: LogicalMesh, function: Function) -> Function:
    """The function, for `jax.jit`, with this mesh and its rules in force where it calls `constrain`."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with _in_force(mesh.devices.abstract_mesh, mesh.rules):
            return function(*args, **kwargs)

    return traced  # type: ignore[return-value]


def decoding() -> contextlib.AbstractContextManager[None]:
    """In a function that runs `within` a mesh, the mesh and the rules of a loop over tokens; elsewhere nothing.

    The devices stay in their order, so that what has one layout by both moves nowhere. JAX wants the arrays of random
    functions to be of one mesh: those made before are to be laid out by `constrain` first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _RULES.get():
        return contextlib.nullcontext()
    sizes = decoding_sizes(mesh.shape)
    split = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return _in_force(split, DECODING)


def decoding_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the mesh axes in `decoding`: fsdp split in two, with the fewest columns of which * model >= the rest.

    A weight's rows are split over fsdp and its columns over columns * model. Of what moves for a token one part is
    divided by the one and a part some times as large by the other (2211.05102).
    """
    fsdp, model = sizes["fsdp"], sizes["model"]
    columns = next(n for n in range(1, fsdp + 1) if fsdp % n == 0 and n * n * model >= fsdp)
    return {"data": sizes["data"], "fsdp": fsdp // columns, "columns": columns, "model": model}


@contextlib.contextmanager
def _in_force(mesh: AbstractMesh, rules: Rules) -> Iterator[None]:
    token = _RULES.set(rules)
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    finally:
        _RULES.reset(token)


def constrain(x: Array, *names: str | None) -> Array:
    """Lays out an array inside of a function that runs `within` a mesh; elsewhere returns it as it is.

    Args:
      x: an array.
      names: the logical names of its axes; None is whole on every device.
    """
    spec = spec_within(x.shape, *names)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def spec_within(shape: Sequence[int], *names: str | None) -> PartitionSpec | None:
    """The mesh axes of an array inside of a function that runs `within` a mesh; None elsewhere."""
    mesh, rules = jax.sharding.get_abstract_mesh(), _RULES.get()
    if mesh.empty or not rules:
        return None
    if len(names) != len(shape):
        raise ValueError(f"constrain: {len(names)} names {names} for an array of shape {tuple(shape)}")
    return partition_spec(names, shape, mesh.shape, rules)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def constrain_like(boxed: Any, tree: Any) -> Any:
    """Lays out a tree of arrays, as `constrain` does, by the names that (abstract) boxed parameters carry."""
    return jax.tree.map(lambda box, x: constrain(x, *box.names), boxed, tree, is_leaf=_is_box)


def shardings_of(tree: Any, mesh: LogicalMesh) -> Any:
    """The sharding of every leaf of a tree of (abstract) boxed parameters or optimizer state.

    An axis that its mesh axis does not divide is left whole, and so is a leaf whose rank is not its parameter's
    (Adafactor's factored moments), so that any size runs on any mesh.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if not _is_box(leaf) or len(leaf.names) != leaf.value.ndim:
            return replicated(mesh)
        return NamedSharding(mesh.devices, partition_spec(leaf.names, leaf.value.shape, mesh.shape, mesh.rules))

    return jax.tree.map(sharding, tree, is_leaf=_is_box)


def of_axes(function: Callable[[tuple[str | None, ...]], Any], boxed: Any) -> Any:
    """The tree of what a function makes of the names of the axes of each of (abstract) boxed parameters."""
    return jax.tree.map(lambda box: function(box.names), boxed, is_leaf=_is_box)


def unbox(tree: Any) -> Any:
    """The tree with plain arrays in place of arrays that carry logical axis names."""
    return jax.tree.map(lambda leaf: leaf.value if _is_box(leaf) else leaf, tree, is_leaf=_is_box)


def batch_sharding(mesh: LogicalMesh) -> NamedSharding:
    """The first axis over data and fsdp, for batches."""
    return NamedSharding(mesh.devices, PartitionSpec(("data", "fsdp")))


def replicated(mesh: LogicalMesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh.devices, PartitionSpec())
