"""Logical axis names, as in T5X, and the mesh axes they are laid over."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The names that parameters carry -> the mesh axis that splits them. A name without a rule is not split.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("kv_heads", None),
    ("embed", "fsdp"),
    ("kv", None),
    ("layers", None),
    ("relpos_buckets", None),
)

BATCH_AXES = ("data", "fsdp")


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a tree of (abstract) boxed parameters or optimizer state.

    An axis that its mesh axis does not divide is left whole, and so is a leaf whose rank is not its parameter's
    (Adafactor's factored moments), so that any size runs on any mesh.
    """
    rules = dict(LOGICAL_AXIS_RULES)

    def sharding(leaf: Any) -> NamedSharding:
        if not _is_box(leaf) or len(leaf.names) != leaf.value.ndim:
            return replicated(mesh)
        axes = [rules.get(name) for name in leaf.names]
        return NamedSharding(
            mesh,
            PartitionSpec(
                *(
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, leaf.value.shape, strict=True)
                )
            ),
        )

    return jax.tree.map(sharding, tree, is_leaf=_is_box)


def unbox(tree: Any) -> Any:
    """The tree with plain arrays in place of arrays that carry logical axis names."""
    return jax.tree.map(lambda leaf: leaf.value if _is_box(leaf) else leaf, tree, is_leaf=_is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over data and fsdp, for batches."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
