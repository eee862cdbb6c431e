"""Shardings of parameters, optimizer states and batches, and sharding constraints inside functions."""

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

from alignment_gap.sharding.chips import CHIPS, DEVICE_KINDS, Chip, hops
from alignment_gap.sharding.mesh import LogicalMesh
from alignment_gap.sharding.rules import DECODING, DECODING_BY_HEADS, Rules

Function = TypeVar("Function", bound=Callable[..., Any])

# Not flax's own context: with it, flax would constrain each layer's parameters by the axis names of the whole stack.
_RULES: contextvars.ContextVar[Rules] = contextvars.ContextVar("logical axis rules", default=())
_KIND: contextvars.ContextVar[str | None] = contextvars.ContextVar("the kind of the mesh's devices", default=None)
# Sums over devices in each layer of a loop over tokens: after self-attention, cross-attention and the MLP.
_SUMS = 3
# The largest part of a chip's memory that the weights of a loop over tokens may take in addition.
_SHARE = 1 / 8
# How many times its even part of the parameters a device may hold before the user is told.
_UNEVEN = 1.25


def partition_spec(
    names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int], rules: Rules
) -> PartitionSpec:
    """The mesh axes that split an array: each axis takes the first rule whose mesh axes are free and divide its size.

    Args:
      names: logical names of the array's axes; an axis named None is never split.
      shape: shape of the array.
      sizes: sizes of the mesh axes.
      rules: rules in order of precedence.
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
    """The function, for `jax.jit`; `constrain` inside it uses this mesh and its rules."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        token = _KIND.set(mesh.devices.devices.flat[0].device_kind)
        try:
            with _in_force(mesh.devices.abstract_mesh, mesh.rules):
                return function(*args, **kwargs)
        finally:
            _KIND.reset(token)

    return traced  # type: ignore[return-value]


def decoding(*, weights: int, layers: int, kv_heads: int) -> contextlib.AbstractContextManager[None]:
    """A context with the mesh and the rules for a loop over tokens; has no effect outside a function `within` a mesh.

    Both meshes have the same order of devices, so arrays that both rules lay out alike are not moved. JAX needs all
    arrays of a random function on the same mesh, so call `constrain` in this context on arrays made before it.

    Args:
      weights: bytes of the weights that each token reads.
      layers: number of layers that each token passes.
      kv_heads: number of key and value heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _RULES.get():
        return contextlib.nullcontext()
    chip = CHIPS.get(DEVICE_KINDS.get(_KIND.get() or "", ""))
    sizes = decoding_sizes(mesh.shape, weight_copies(mesh.shape, chip, weights, layers))
    split = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    by_heads = kv_heads % (sizes["columns"] * sizes["model"]) == 0
    return _in_force(split, DECODING_BY_HEADS if by_heads else DECODING)


def weight_copies(sizes: Mapping[str, int], chip: Chip | None, weights: int, layers: int) -> int:
    """The number of copies of the weights along fsdp with which a loop over tokens takes the least time.

    Fewer devices for each copy read more bytes, but their sums take fewer hops. A token takes at least the time to read
    its device's part of the weights, and that of the sums, which are small and take as long as their hops. A copy may
    take an eighth of a chip's memory on each device; if none can be that small, or if the time of a hop is unknown,
    there is one copy.
    """
    if chip is None or not chip.hop:
        return 1

    def seconds(devices: int) -> float:
        far = hops(devices, ring=devices % chip.wraps == 0)
        return weights / devices / chip.hbm_bandwidth + layers * _SUMS * 2 * far * chip.hop

    fsdp, model = sizes["fsdp"], sizes["model"]
    parts = [n for n in range(1, fsdp + 1) if fsdp % n == 0 and weights / (n * model) <= _SHARE * chip.hbm]
    return fsdp // min(parts, key=lambda n: seconds(n * model), default=fsdp)


def decoding_sizes(sizes: Mapping[str, int], copies: int = 1) -> dict[str, int]:
    """Sizes of the mesh axes in `decoding`, where fsdp is split into copies, fsdp and columns.

    Several copies split the columns of the weights only. A single copy splits rows and columns: it has the fewest
    columns with columns * model >= fsdp. The data moved for each token then has two parts: fsdp divides one,
    columns * model the other, which is several times larger (2211.05102).
    """
    fsdp, model = sizes["fsdp"] // copies, sizes["model"]
    columns = fsdp
    if copies == 1:
        columns = next(n for n in range(1, fsdp + 1) if fsdp % n == 0 and n * n * model >= fsdp)
    return {"data": sizes["data"], "copies": copies, "fsdp": fsdp // columns, "columns": columns, "model": model}


def on_one_cpu() -> bool:
    """Whether a single CPU computes the function that JAX traces now."""
    kind, mesh = _KIND.get() or jax.devices()[0].device_kind, jax.sharding.get_abstract_mesh()
    return kind == "cpu" and (mesh.empty or mesh.size == 1)


@contextlib.contextmanager
def _in_force(mesh: AbstractMesh, rules: Rules) -> Iterator[None]:
    token = _RULES.set(rules)
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            yield
    finally:
        _RULES.reset(token)


def constrain(x: Array, *names: str | None) -> Array:
    """Shards an array in a function that runs `within` a mesh; elsewhere returns it unchanged.

    Args:
      x: an array.
      names: the logical names of its axes; an axis named None is not split.
    """
    spec = spec_within(x.shape, *names)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def spec_within(shape: Sequence[int], *names: str | None) -> PartitionSpec | None:
    """The mesh axes that split an array in a function that runs `within` a mesh; None elsewhere."""
    mesh, rules = jax.sharding.get_abstract_mesh(), _RULES.get()
    if mesh.empty or not rules:
        return None
    if len(names) != len(shape):
        raise ValueError(f"constrain: {len(names)} names {names} for an array of shape {tuple(shape)}")
    return partition_spec(names, shape, mesh.shape, rules)


def parts_within(size: int, name: str) -> int:
    """The number of parts into which an axis is split in a function that runs `within` a mesh; 1 elsewhere."""
    spec = spec_within((size,), name)
    axes = spec[0] if spec else None
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in names)


def is_box(leaf: Any) -> bool:
    """Whether a node of parameters is a box: an array with its logical axis names."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def constrain_like(boxed: Any, tree: Any, **renamed: str) -> Any:
    """Shards a tree of arrays, as `constrain` does, by the axis names of (abstract) boxed parameters.

    Several arrays may be in the place of one parameter, such as a kernel with adapters; the first has the axes' names.
    Keywords rename axes: embed="copied_embed" lays out all axes named "embed" by the rules of "copied_embed".
    """

    def constrained(box: Any, node: Any) -> Any:
        (first, *rest), structure = jax.tree.flatten(node)
        names = [renamed.get(name, name) for name in box.names]
        return jax.tree.unflatten(structure, [constrain(first, *names), *rest])

    return jax.tree.map(constrained, boxed, tree, is_leaf=is_box)


def shardings_of(tree: Any, mesh: LogicalMesh) -> Any:
    """The sharding of every leaf of a tree of (abstract) boxed parameters or optimizer state.

    If a mesh axis does not divide an axis, that axis stays whole. A leaf whose rank differs from its parameter's stays
    whole too (Adafactor's factored moments). So any size runs on any mesh.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if not is_box(leaf) or len(leaf.names) != leaf.value.ndim:
            return replicated(mesh)
        return NamedSharding(mesh.devices, partition_spec(leaf.names, leaf.value.shape, mesh.shape, mesh.rules))

    return jax.tree.map(sharding, tree, is_leaf=is_box)


def undivided(boxed: Any, sizes: Mapping[str, int], rules: Rules) -> str | None:
    """One line if a device holds over 1.25 times its even part of the (abstract) boxed parameters; None otherwise.

    It names the array that the mesh should divide first.
    """
    parts, extra, total = sizes["fsdp"] * sizes["model"], dict[str, float](), 0
    for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=is_box):
        spec = partition_spec(leaf.names, leaf.value.shape, sizes, rules)
        axes = [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
        name = f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.value.shape}"
        extra[name] = leaf.value.size / math.prod(sizes[axis] for axis in axes) - leaf.value.size / parts
        total += leaf.value.size
    times = 1 + sum(extra.values()) * parts / total
    if times <= _UNEVEN:
        return None
    return (
        f"a device holds {times:.1f} times its even part of the parameters: fsdp={sizes['fsdp']} "
        f"model={sizes['model']} does not divide {max(extra, key=extra.__getitem__)}; choose sizes that do"
    )


def of_axes(function: Callable[[tuple[str | None, ...]], Any], boxed: Any) -> Any:
    """The tree of a function's results for the axis names of each of the (abstract) boxed parameters."""
    return jax.tree.map(lambda box: function(box.names), boxed, is_leaf=is_box)


def unbox(tree: Any) -> Any:
    """The tree with plain arrays, without the boxes that hold logical axis names."""
    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box)


def batch_sharding(mesh: LogicalMesh) -> NamedSharding:
    """The sharding of batches: the first axis is split over data and fsdp."""
    return NamedSharding(mesh.devices, PartitionSpec(("data", "fsdp")))


def replicated(mesh: LogicalMesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh.devices, PartitionSpec())
