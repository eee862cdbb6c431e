"""The device mesh and the rules that lay parameters, activations and batches out over it."""

from alignment_gap.sharding.layout import (
    batch_sharding,
    constrain,
    partition_spec,
    replicated,
    shardings_of,
    unbox,
    within,
)
from alignment_gap.sharding.mesh import LogicalMesh, MeshConfig, make_mesh
from alignment_gap.sharding.rules import AXES, LAYOUTS, SEQUENCE, STANDARD, Layout, Rules

__all__ = [
    "AXES",
    "LAYOUTS",
    "SEQUENCE",
    "STANDARD",
    "Layout",
    "LogicalMesh",
    "MeshConfig",
    "Rules",
    "batch_sharding",
    "constrain",
    "make_mesh",
    "partition_spec",
    "replicated",
    "shardings_of",
    "unbox",
    "within",
]
