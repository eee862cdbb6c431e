"""Meshes by hand, and where the rules lay parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_models import MESHES

from alignment_gap.errors import UserError
from alignment_gap.losses._token_log_probs import _number_of_blocks
from alignment_gap.sharding import (
    DECODING,
    SEQUENCE,
    STANDARD,
    MeshConfig,
    batch_sharding,
    check_batch_size,
    constrain,
    decoding,
    host_rows,
    make_mesh,
    on_every_process,
    on_first_process,
    partition_spec,
    put_batch,
    replicated,
    shardings_of,
    unbox,
    within,
)
from alignment_gap.sharding.layout import decoding_sizes


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(1, 2, -1), (1, 2, 4)),
        (MeshConfig(8, 1, 1), (8, 1, 1)),
        (MeshConfig(layout="fsdp"), (1, 8, 1)),
        (MeshConfig(layout="tensor"), (1, 1, 8)),
        (MeshConfig(layout="fsdp_tensor"), (1, 2, 4)),
        (MeshConfig(layout="sequence", model=2), (1, 4, 2)),
        (MeshConfig(data=2, layout="fsdp"), (2, 4, 1)),
        # A size of -1 that is given takes what the layout's own would.
        (MeshConfig(data=-1, fsdp=2, layout="tensor"), (4, 2, 1)),
        # Two slices: the axis that reaches over their network is data.
        (MeshConfig(layout="fsdp", slices=2), (2, 4, 1)),
    ],
)
def test_mesh_shapes(config, shape):
    assert config.shape(8) == shape
    if config.slices > 1:
        return
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
        (MeshConfig(layout="zero"), "layout 'zero' is unknown: choose one of data, fsdp, tensor"),
        (MeshConfig(rules={"embed": "modl"}), "rule embed='modl': a mesh has the axes data, fsdp, model"),
        (MeshConfig(slices=0), "slices is 0"),
        (MeshConfig(data=1, fsdp=8, slices=2), "data=1 is not a multiple of slices=2"),
        (MeshConfig(slices=2), "slices is 2 but the devices are of 1: set slices=1"),
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


SIZES = {"data": 2, "fsdp": 2, "model": 2}


@pytest.mark.parametrize(
    ("names", "shape", "rules", "spec"),
    [
        # The batch takes fsdp, so an activation's width stays whole.
        (("batch", None, "length", "embed"), (8, 2, 6, 16), STANDARD, P(("data", "fsdp"), None, None, None)),
        (("batch", "length", "mlp"), (8, 6, 24), STANDARD, P(("data", "fsdp"), None, "model")),
        (("batch", "kv_length", "kv_heads", "kv"), (8, 6, 1, 4), STANDARD, P(("data", "fsdp"), None, None, None)),
        (("batch", "kv_length", "kv_heads", "kv"), (8, 6, 4, 4), STANDARD, P(("data", "fsdp"), None, "model", None)),
        # Positions are split where nothing else is, and they divide.
        (("batch", "length", "embed"), (8, 6, 16), SEQUENCE, P(("data", "fsdp"), "model", None)),
        (("batch", "length", "heads", "kv"), (8, 6, 4, 4), SEQUENCE, P(("data", "fsdp"), None, "model", None)),
        (("batch", "length", "embed"), (8, 7, 16), SEQUENCE, P(("data", "fsdp"), None, None)),
        # A rule before another of its name counts; None ends the search; a second one is taken where the first fails.
        (("mlp", "embed"), (8, 8), (("embed", None), *STANDARD), P("model", None)),
        (("batch",), (2,), (*STANDARD, ("batch", "data")), P("data")),
    ],
)
def test_rules_by_hand(names, shape, rules, spec):
    assert partition_spec(names, shape, SIZES, rules) == spec


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 256, 1), (1, 16, 16, 1)),
        ((1, 64, 4), (1, 16, 4, 4)),
        ((2, 8, 1), (2, 2, 4, 1)),
        ((1, 6, 1), (1, 2, 3, 1)),
        ((1, 32, 4), (1, 8, 4, 4)),
        # A prime is all columns, and what model outweighs is not split.
        ((1, 7, 1), (1, 1, 7, 1)),
        ((1, 2, 2), (1, 2, 1, 2)),
        ((8, 1, 1), (8, 1, 1, 1)),
        ((1, 1, 8), (1, 1, 1, 8)),
    ],
)
def test_decoding_splits_fsdp_in_two(sizes, expected):
    found = decoding_sizes(dict(zip(("data", "fsdp", "model"), sizes, strict=True)))
    assert found == dict(zip(("data", "fsdp", "columns", "model"), expected, strict=True))


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        # Weights are split along both axes; a single head, which is not split, along one.
        (("layers", "embed", "heads", "kv"), (3, 16, 8, 4), P(None, "fsdp", ("columns", "model"), None)),
        (("layers", "mlp", "embed"), (3, 24, 16), P(None, ("columns", "model"), "fsdp")),
        (("embed", "kv_heads", "kv"), (16, 1, 4), P("fsdp", None, None)),
        (("embed", "heads", "kv"), (16, 6, 4), P("fsdp", "model", None)),
        # The stream is split by width as their rows are, what they give as their columns are.
        (("batch", None, "length", "embed"), (16, 2, 1, 16), P("data", None, None, "fsdp")),
        (("batch", None, None, "mlp"), (16, 2, 1, 24), P(("data", "fsdp"), None, None, ("columns", "model"))),
        # The cache lies as batch_sharding does on the whole mesh.
        (
            ("layers", "cache_batch", None, "kv_heads", "kv_length", "kv"),
            (3, 16, 2, 8, 6, 4),
            P(None, ("data", "fsdp", "columns"), None, "model", None, None),
        ),
    ],
)
def test_rules_of_decoding_by_hand(names, shape, spec):
    assert partition_spec(names, shape, {"data": 2, "fsdp": 4, "columns": 2, "model": 2}, DECODING) == spec


def test_decoding_leaves_a_batch_where_it_is():
    mesh = make_mesh(MESHES["fsdp"])
    x, whole = np.ones((8, 8)), replicated(mesh)

    def lay_out(x, y):
        with decoding():
            return constrain(2 * x, "cache_batch", None), constrain(2 * y, None, "embed")

    batch, stream = jax.jit(within(mesh, lay_out))(jax.device_put(x, batch_sharding(mesh)), jax.device_put(x, whole))
    assert batch.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert stream.sharding.shard_shape((8, 8)) == (8, 4)
    with decoding():
        assert constrain(x, "cache_batch", None) is x


def test_rules_of_a_config_precede_its_layouts():
    mesh = make_mesh(MeshConfig(2, 2, 2, rules={"embed": None, "kv": ["model"]}))
    assert shardings_of(boxed(("embed", "kv"), (8, 4)), mesh).spec == P(None, ("model",))


def test_constrain_lays_out_within_a_mesh_and_nowhere_else():
    mesh = make_mesh(MESHES["all"])
    x = jax.device_put(np.ones((8, 6, 16)), replicated(mesh))

    def lay_out(x):
        return constrain(2 * x, "batch", "length", "embed")

    inside, outside = jax.jit(within(mesh, lay_out))(x), jax.jit(lay_out)(x)
    assert inside.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    assert outside.sharding.is_fully_replicated
    with pytest.raises(ValueError, match="1 names"):
        jax.jit(within(mesh, lambda x: constrain(x, "batch")))(x)


def test_blocks_of_logits_are_counted_over_the_mesh():
    """2^16 tokens and 2^12 ids are 1 GiB of logits: 16 blocks of 64 MiB, or two of eight devices."""
    assert _number_of_blocks(2**16, 2**12, None) == 16
    assert within(make_mesh(MESHES["all"]), lambda: _number_of_blocks(2**16, 2**12, None))() == 2


class Chip:
    """What mesh_utils reads of a device."""

    def __init__(self, number):
        self.id, self.slice_index, self.process_index = number, number % 2, number
        self.platform, self.device_kind = "cpu", "cpu"


def test_slices_lie_along_the_data_axis():
    from alignment_gap.sharding.mesh import _over_slices

    devices = _over_slices(2, (4, 2, 1), [Chip(number) for number in range(8)])
    assert devices.shape == (4, 2, 1)
    slices = np.vectorize(lambda device: device.slice_index)(devices)
    np.testing.assert_array_equal(slices[:, :, 0], [[0, 0], [0, 0], [1, 1], [1, 1]])


def test_a_process_puts_the_rows_that_it_holds():
    """One process holds all of them; tests/cli/test_processes.py has several."""
    mesh, rows = make_mesh(MESHES["all"]), np.arange(24.0).reshape(8, 3)
    np.testing.assert_array_equal(host_rows(mesh, 8), np.arange(8))
    with jax.transfer_guard("disallow"):
        batch = put_batch({"x": rows, "n": np.arange(8)}, mesh, 8)
    np.testing.assert_array_equal(batch["x"], rows)
    assert batch["n"].sharding == batch_sharding(mesh)
    with pytest.raises(ValueError, match="4 rows given, but this process holds 8 of 8"):
        put_batch(rows[:4], mesh, 8)


def test_batches_that_a_mesh_does_not_divide_are_refused():
    check_batch_size("batch_size", 16, 4, 4)
    with pytest.raises(UserError, match=r"batch_size is 6: it must be a multiple of data \* fsdp = 4"):
        check_batch_size("batch_size", 6, 4)
    with pytest.raises(UserError, match=r"batch_size is 8: .* data \* fsdp \* microbatches = 16"):
        check_batch_size("batch_size", 8, 4, 4)


def refuse():
    raise UserError("refused")


def test_a_single_process_is_the_first():
    done = []
    on_first_process(lambda: done.append(1))
    assert done == [1] and on_every_process(lambda: 2) == 2
    for call in (on_first_process, on_every_process):
        with pytest.raises(UserError, match=r"^refused$"):
            call(refuse)
