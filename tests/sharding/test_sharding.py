"""Meshes by hand, and where the rules lay parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import MESHES

from alignment_gap.errors import UserError
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh, replicated, shardings_of, unbox


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(1, 2, -1), (1, 2, 4)),
        (MeshConfig(8, 1, 1), (8, 1, 1)),
    ],
)
def test_mesh_shapes(config, shape):
    assert config.shape(8) == shape
    mesh = make_mesh(config)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "model"), shape, strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 1, 1), "data=3, fsdp=1, model=1 takes a multiple of 3 devices but 8 are present"),
        (MeshConfig(4, 1, 1), "takes a multiple of 4 devices but 8 are present"),
        (MeshConfig(-1, 16, 1), "takes a multiple of 16 devices"),
        (MeshConfig(-1, -1, 1), "one of them may be -1"),
        (MeshConfig(-2, 1, 1), "sizes must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


def boxed(names, shape):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("vocab", "embed"), (16, 8), P("model", "fsdp")),
        (("layers", "embed", "heads", "kv"), (3, 8, 4, 5), P(None, "fsdp", "model", None)),
        (("layers", "mlp", "embed"), (3, 6, 8), P(None, "model", "fsdp")),
        (("heads", "relpos_buckets"), (4, 32), P("model", None)),
        # 15 rows are not split in two, nor are 7 columns.
        (("vocab", "embed"), (15, 7), P(None, None)),
        # A factored moment has lost an axis that its name still has.
        (("layers", "embed", "mlp"), (3, 8), P()),
    ],
)
def test_axes_follow_their_rules_where_they_divide(names, shape, spec):
    sharding = shardings_of({"w": boxed(names, shape)}, make_mesh(MESHES["all"]))["w"]
    assert sharding.spec == spec


def test_what_has_no_names_is_replicated():
    mesh = make_mesh(MESHES["all"])
    assert shardings_of(jax.ShapeDtypeStruct((8,), jnp.float32), mesh) == replicated(mesh)


def test_batches_are_split_over_data_and_fsdp():
    array = jax.device_put(np.arange(8), batch_sharding(make_mesh(MESHES["all"])))
    parts = {tuple(shard.data.tolist()) for shard in array.addressable_shards}
    assert parts == {(0, 1), (2, 3), (4, 5), (6, 7)}


def test_unbox_keeps_plain_leaves():
    tree = unbox({"a": nn.LogicallyPartitioned(1, ("embed",)), "b": 2})
    assert tree == {"a": 1, "b": 2}
