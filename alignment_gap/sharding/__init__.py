"""The device mesh and the rules that lay parameters, activations and batches out over it."""

from alignment_gap.sharding.layout import (
    batch_sharding,
    constrain,
    constrain_like,
    decoding,
    partition_spec,
    replicated,
    shardings_of,
    spec_within,
    unbox,
    within,
)
from alignment_gap.sharding.mesh import LogicalMesh, MeshConfig, check_batch_size, make_mesh
from alignment_gap.sharding.processes import (
    host_rows,
    initialize,
    is_first_process,
    on_every_process,
    on_first_process,
    put_batch,
)
from alignment_gap.sharding.rules import AXES, DECODING, LAYOUTS, SEQUENCE, STANDARD, Layout, Rules

__all__ = [
    "AXES",
    "DECODING",
    "LAYOUTS",
    "SEQUENCE",
    "STANDARD",
    "Layout",
    "LogicalMesh",
    "MeshConfig",
    "Rules",
    "batch_sharding",
    "check_batch_size",
    "constrain",
    "constrain_like",
    "decoding",
    "host_rows",
    "initialize",
    "is_first_process",
    "make_mesh",
    "on_every_process",
    "on_first_process",
    "partition_spec",
    "put_batch",
    "replicated",
    "shardings_of",
    "spec_within",
    "unbox",
    "within",
]
