"""The device mesh and the rules that lay parameters and batches out over it."""

from alignment_gap.sharding.mesh import MeshConfig, make_mesh
from alignment_gap.sharding.rules import LOGICAL_AXIS_RULES, batch_sharding, replicated, shardings_of, unbox

__all__ = ["LOGICAL_AXIS_RULES", "MeshConfig", "batch_sharding", "make_mesh", "replicated", "shardings_of", "unbox"]
