"""How the rules lay out parameters, activations and batches: by hand, and by properties of any array."""

import dataclasses
import math

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.sharding import PartitionSpec as P
from tiny_models import EVEN_CONFIGS, MESHES, SETTINGS

from alignment_gap.losses._token_log_probs import _number_of_blocks
from alignment_gap.models import make_policy
from alignment_gap.sharding import (
    AXES,
    DECODING,
    DECODING_BY_HEADS,
    LAYOUTS,
    SEQUENCE,
    STANDARD,
    MeshConfig,
    batch_sharding,
    constrain,
    constrain_like,
    decoding,
    layout,
    make_mesh,
    on_one_cpu,
    partition_spec,
    parts_within,
    replicated,
    shardings_of,
    spec_within,
    unbox,
    undivided,
    within,
)
from alignment_gap.sharding.chips import CHIPS
from alignment_gap.sharding.layout import decoding_sizes, weight_copies


def boxed(names, shape):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("vocab", "embed"), (16, 8), P("model", "fsdp")),
        (("layers", "embed", "heads", "kv"), (3, 8, 4, 5), P(None, "fsdp", "model", None)),
        (("layers", "mlp", "embed"), (3, 6, 8), P(None, "model", "fsdp")),
        (("heads", "relpos_buckets"), (4, 32), P("model", None)),
        # fsdp splits a part of an adapter along the width; a part without the width, along the rank.
        (("layers", "embed", "rank"), (3, 8, 4), P(None, "fsdp", None)),
        (("layers", "rank", "heads", "kv"), (3, 4, 4, 5), P(None, "fsdp", "model", None)),
        # Neither 15 rows nor 7 columns can be split in two.
        (("vocab", "embed"), (15, 7), P(None, None)),
        # A factored moment has one axis less than its names.
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
        # The batch uses fsdp, so the width of an activation stays whole.
        (("batch", None, "length", "embed"), (8, 2, 6, 16), STANDARD, P(("data", "fsdp"), None, None, None)),
        (("batch", "length", "mlp"), (8, 6, 24), STANDARD, P(("data", "fsdp"), None, "model")),
        (("batch", "kv_length", "kv_heads", "kv"), (8, 6, 1, 4), STANDARD, P(("data", "fsdp"), None, None, None)),
        (("batch", "kv_length", "kv_heads", "kv"), (8, 6, 4, 4), STANDARD, P(("data", "fsdp"), None, "model", None)),
        # Positions are split if nothing else is, and if they can be divided.
        (("batch", "length", "embed"), (8, 6, 16), SEQUENCE, P(("data", "fsdp"), "model", None)),
        (("batch", "length", "heads", "kv"), (8, 6, 4, 4), SEQUENCE, P(("data", "fsdp"), None, "model", None)),
        (("batch", "length", "embed"), (8, 7, 16), SEQUENCE, P(("data", "fsdp"), None, None)),
        # The first rule of a name counts; None ends the search; a second rule applies if the first one fails.
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
        # A prime number becomes columns only. Nothing is split if model is as large.
        ((1, 7, 1), (1, 1, 7, 1)),
        ((1, 2, 2), (1, 2, 1, 2)),
        ((8, 1, 1), (8, 1, 1, 1)),
        ((1, 1, 8), (1, 1, 1, 8)),
    ],
)
def test_decoding_splits_fsdp_in_two(sizes, expected):
    found = decoding_sizes(dict(zip(("data", "fsdp", "model"), sizes, strict=True)))
    assert found.pop("copies") == 1
    assert found == dict(zip(("data", "fsdp", "columns", "model"), expected, strict=True))


def test_several_copies_split_the_columns_of_weights_only():
    found = decoding_sizes({"data": 2, "fsdp": 64, "model": 4}, copies=16)
    assert found == {"data": 2, "copies": 16, "fsdp": 1, "columns": 4, "model": 4}


# A chip that reads a gigabyte a second, with a gigabyte of memory, rings of 8, and hops of a millisecond.
SLOW = dataclasses.replace(CHIPS["v5e"], hbm=2**30, hbm_bandwidth=1e9, wraps=8, hop=1e-3)


@pytest.mark.parametrize(
    ("weights", "layers", "fsdp", "model", "copies"),
    [
        # A token of 100 MB takes 100 / n ms to read, and 6 ms a hop. By n = 1, 2, 4, 8: 100, 56, 43, 36.5 ms; in a
        # ring of 16 it is 54.25.
        (100_000_000, 1, 16, 1, 2),
        (100_000_000, 1, 8, 1, 1),
        # With ten layers 60 ms a hop: one device reads all, 100 ms.
        (100_000_000, 10, 8, 1, 8),
        # A copy takes at most an eighth of a gigabyte on each device.
        (1_000_000_000, 100, 16, 1, 2),
        (10_000_000_000, 1, 16, 1, 1),
        # The model axis splits the columns too.
        (100_000_000, 1, 8, 2, 2),
    ],
)
def test_how_many_copies_of_the_weights_take_the_least_time(weights, layers, fsdp, model, copies):
    sizes = {"data": 1, "fsdp": fsdp, "model": model}
    assert weight_copies(sizes, SLOW, weights, layers) == copies


def test_without_a_known_hop_there_is_one_copy():
    sizes = {"data": 1, "fsdp": 8, "model": 1}
    assert [weight_copies(sizes, chip, 1, 1) for chip in (None, CHIPS["h100"], CHIPS["v5e"])] == [1, 1, 8]


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        # Weights are split along both axes. A single head cannot be split, so only one axis is.
        (("layers", "embed", "heads", "kv"), (3, 16, 8, 4), P(None, "fsdp", ("columns", "model"), None)),
        (("layers", "mlp", "embed"), (3, 24, 16), P(None, ("columns", "model"), "fsdp")),
        (("embed", "kv_heads", "kv"), (16, 1, 4), P("fsdp", None, None)),
        (("embed", "heads", "kv"), (16, 6, 4), P("fsdp", "model", None)),
        # The stream is split by width, like the rows of weights; outputs are split like the columns.
        (("batch", None, "length", "embed"), (16, 2, 1, 16), P(("data", "copies"), None, None, "fsdp")),
        (("batch", None, None, "mlp"), (16, 2, 1, 24), P(("data", "copies", "fsdp"), None, None, ("columns", "model"))),
        # The cache is laid out like batch_sharding on the whole mesh.
        (
            ("layers", "cache_batch", None, "kv_heads", "kv_length", "kv"),
            (3, 16, 2, 8, 6, 4),
            P(None, ("data", "copies", "fsdp", "columns"), None, "model", None, None),
        ),
        # Each copy has its own rows of the batch, and each of its devices draws for a part of them.
        (("rows", None), (16, 2), P(("data", "copies"), None)),
        (("draws", None, "vocab"), (16, 2, 32), P(("data", "copies", "fsdp", "columns"), None, "model")),
    ],
)
def test_rules_of_decoding_by_hand(names, shape, spec):
    sizes = {"data": 2, "copies": 1, "fsdp": 4, "columns": 2, "model": 2}
    assert partition_spec(names, shape, sizes, DECODING) == spec


def test_with_enough_heads_the_cache_is_split_by_heads():
    sizes, names = {"data": 1, "copies": 4, "fsdp": 1, "columns": 2, "model": 2}, ("cache_batch", None, "heads", "kv")
    assert partition_spec(names, (16, 2, 8, 4), sizes, DECODING_BY_HEADS) == P(
        ("data", "copies", "fsdp"), None, ("columns", "model"), None
    )
    # As the projection leaves it, so that nothing moves.
    assert partition_spec(("batch", *names[1:]), (16, 2, 8, 4), sizes, DECODING_BY_HEADS) == P(
        ("data", "copies", "fsdp"), None, ("columns", "model"), None
    )


def test_decoding_leaves_a_batch_where_it_is():
    mesh = make_mesh(MESHES["fsdp"])
    x, whole = jnp.ones((8, 8)), replicated(mesh)

    def lay_out(x, y):
        with decoding(weights=1, layers=1, kv_heads=3):
            return constrain(2 * x, "cache_batch", None), constrain(2 * y, None, "embed")

    batch, stream = jax.jit(within(mesh, lay_out))(jax.device_put(x, batch_sharding(mesh)), jax.device_put(x, whole))
    assert batch.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert stream.sharding.shard_shape((8, 8)) == (8, 4)
    with decoding(weights=1, layers=1, kv_heads=3):
        assert constrain(x, "cache_batch", None) is x


@pytest.mark.parametrize(
    ("devices", "kind", "expected"),
    [(1, "cpu", True), (8, "cpu", False), (1, "NVIDIA H200", False), (1, "TPU v5 lite", False)],
)
def test_one_cpu_is_told_from_other_devices(devices, kind, expected):
    found = []

    def look(x):
        token = layout._KIND.set(kind)
        found.append(on_one_cpu())
        layout._KIND.reset(token)
        return x

    jax.eval_shape(within(make_mesh(MeshConfig(), jax.devices()[:devices]), look), jnp.ones(8))
    assert found == [expected]
    assert on_one_cpu()  # These tests have CPUs alone; without a mesh an array is on one.


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
    """2^16 tokens and 2^12 ids have 1 GiB of logits: 16 blocks of 64 MiB, or two blocks on eight devices."""
    assert _number_of_blocks(2**16, 2**12, None) == 16
    assert within(make_mesh(MESHES["all"]), lambda: _number_of_blocks(2**16, 2**12, None))() == 2


# The mesh axes of every parameter on the mesh (data=2, fsdp=2, model=2), by hand. The width of a matrix is split over
# fsdp; its heads, hidden units or tokens are split over model.
ATTENTION = {
    "query.kernel": (None, "fsdp", "model", None),
    "key.kernel": (None, "fsdp", "model", None),
    "value.kernel": (None, "fsdp", "model", None),
    "out.kernel": (None, "model", None, "fsdp"),
}
MLP = {
    "wi_0.kernel": (None, "fsdp", "model"),
    "wi_1.kernel": (None, "fsdp", "model"),
    "wo.kernel": (None, "model", "fsdp"),
}


def under(prefix, table):
    return {f"{prefix}.{name}": axes for name, axes in table.items()}


SPECS = {
    "t5": {
        "token_embedder.embedding": ("model", "fsdp"),
        "output_embedder.embedding": ("model", "fsdp"),
        "encoder.encoder_norm.scale": ("fsdp",),
        "decoder.decoder_norm.scale": ("fsdp",),
        # The bias has a number for each head and bucket.
        "encoder.relpos_bias.rel_embedding": ("model", None),
        "decoder.relpos_bias.rel_embedding": ("model", None),
        **under("encoder.layers.attention", ATTENTION),
        **under("encoder.layers.mlp", MLP),
        "encoder.layers.pre_attention_layer_norm.scale": (None, "fsdp"),
        "encoder.layers.pre_mlp_layer_norm.scale": (None, "fsdp"),
        **under("decoder.layers.self_attention", ATTENTION),
        **under("decoder.layers.encoder_decoder_attention", ATTENTION),
        **under("decoder.layers.mlp", MLP),
        "decoder.layers.pre_self_attention_layer_norm.scale": (None, "fsdp"),
        "decoder.layers.pre_cross_attention_layer_norm.scale": (None, "fsdp"),
        "decoder.layers.pre_mlp_layer_norm.scale": (None, "fsdp"),
    },
    # The single key head is not split. Parallel blocks have one norm.
    "decoder": {
        "token_embedder.embedding": ("model", "fsdp"),
        "decoder.decoder_norm.scale": ("fsdp",),
        **under(
            "decoder.layers", ATTENTION | dict.fromkeys(("key.kernel", "value.kernel"), (None, "fsdp", None, None))
        ),
        **under("decoder.layers.mlp", MLP),
        "decoder.layers.pre_layer_norm.scale": (None, "fsdp"),
    },
    # Two key heads with biases. 13 tokens and 7 hidden units are odd, so these axes stay whole.
    "qwen2": {
        "token_embedder.embedding": (None, "fsdp"),
        "decoder.decoder_norm.scale": ("fsdp",),
        **under("decoder.layers", ATTENTION),
        **under("decoder.layers", dict.fromkeys(("query.bias", "key.bias", "value.bias"), (None, "model", None))),
        **under("decoder.layers.mlp", {"wo.kernel": (None, None, "fsdp")}),
        **under("decoder.layers.mlp", dict.fromkeys(("wi_0.kernel", "wi_1.kernel"), (None, "fsdp", None))),
        "decoder.layers.pre_attention_layer_norm.scale": (None, "fsdp"),
        "decoder.layers.pre_mlp_layer_norm.scale": (None, "fsdp"),
    },
    # Four key heads, biases everywhere, and an MLP of two matrices.
    "gpt_neox": {
        "token_embedder.embedding": (None, "fsdp"),
        "output_embedder.embedding": (None, "fsdp"),
        **under("decoder.decoder_norm", dict.fromkeys(("scale", "bias"), ("fsdp",))),
        **under("decoder.layers", ATTENTION),
        **under("decoder.layers", dict.fromkeys(("query.bias", "key.bias", "value.bias"), (None, "model", None))),
        "decoder.layers.out.bias": (None, "fsdp"),
        **under("decoder.layers.mlp", {"wi.kernel": (None, "fsdp", None), "wi.bias": (None, None)}),
        **under("decoder.layers.mlp", {"wo.kernel": (None, None, "fsdp"), "wo.bias": (None, "fsdp")}),
        **under("decoder.layers.pre_attention_layer_norm", dict.fromkeys(("scale", "bias"), (None, "fsdp"))),
        **under("decoder.layers.pre_mlp_layer_norm", dict.fromkeys(("scale", "bias"), (None, "fsdp"))),
    },
}


def abstract(name):
    return jax.eval_shape(make_policy({**EVEN_CONFIGS, **SETTINGS}[name]).init, jax.random.key(0))


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", SPECS)
def test_parameters_lie_as_the_table_says(name):
    shardings = by_name(shardings_of(abstract(name), make_mesh(MESHES["all"])))
    assert {parameter: tuple(sharding.spec) for parameter, sharding in shardings.items()} == SPECS[name]


@pytest.mark.parametrize(
    ("layout", "sizes", "shards"),
    [
        # The parts of an embedding [16, 16], a query [1, 16, 2, 4], and an MLP's input [1, 16, 24] on one of eight
        # devices.
        ("data", {}, [(16, 16), (1, 16, 2, 4), (1, 16, 24)]),
        ("fsdp", {}, [(16, 2), (1, 2, 2, 4), (1, 2, 24)]),
        # Eight does not divide two heads.
        ("tensor", {}, [(2, 16), (1, 16, 2, 4), (1, 16, 3)]),
        ("fsdp_tensor", {}, [(4, 8), (1, 8, 2, 4), (1, 8, 6)]),
        ("sequence", {"model": 2}, [(8, 4), (1, 4, 1, 4), (1, 4, 12)]),
    ],
)
def test_what_a_device_holds_in_every_layout(layout, sizes, shards):
    tree, mesh = abstract("t5"), make_mesh(MeshConfig(layout=layout, **sizes))
    shardings, shapes = by_name(shardings_of(tree, mesh)), by_name(unbox(tree))
    names = ["token_embedder.embedding", "decoder.layers.self_attention.query.kernel", "encoder.layers.mlp.wi_0.kernel"]
    assert [shardings[name].shard_shape(shapes[name].shape) for name in names] == shards


def test_a_device_that_holds_more_than_its_part_is_told_with_the_array_that_does_it():
    def array(*shape):
        return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, np.float32), names=("vocab", "embed"))

    # A device holds 1/2 of the first array and 1/8 of the second: 160 + 8 elements, where an even part is 48.
    tree, sizes = {"table": array(5, 64), "output": array(4, 16)}, {"data": 2, "fsdp": 2, "model": 4}
    assert undivided(tree, sizes, STANDARD) == (
        "a device holds 3.5 times its even part of the parameters: fsdp=2 model=4 does not divide table (5, 64); "
        "choose sizes that do"
    )
    assert undivided({"table": array(4, 64)}, sizes, STANDARD) is None
    # Copies over data are what that axis is for.
    assert undivided(tree, {"data": 8, "fsdp": 1, "model": 1}, STANDARD) is None


NAMES = ("batch", "cache_batch", "vocab", "mlp", "heads", "kv_heads", "embed", "kv", "length", "layers", None)
ARRAYS = strategies.lists(strategies.tuples(strategies.sampled_from(NAMES), strategies.integers(1, 24)), max_size=6)
MESH_SIZES = strategies.fixed_dictionaries({axis: strategies.sampled_from([1, 2, 3, 4, 8]) for axis in AXES})


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(array=ARRAYS, sizes=MESH_SIZES, layout=strategies.sampled_from(sorted(LAYOUTS)))
def test_no_mesh_axis_splits_two_axes_and_none_is_left_that_fits(array, sizes, layout):
    rules = LAYOUTS[layout].rules
    names, shape = [name for name, _ in array], [size for _, size in array]
    spec = partition_spec(names, shape, sizes, rules)
    targets = [() if target is None else (target,) if isinstance(target, str) else target for target in spec]
    used = [axis for target in targets for axis in target]
    assert len(targets) == len(array) and len(used) == len(set(used))
    for name, size, target in zip(names, shape, targets, strict=True):
        allowed = [axes for rule, axes in rules if rule == name]
        written = [(axes,) if isinstance(axes, str) else axes for axes in allowed if axes]
        assert not target or target in written
        assert size % math.prod(sizes[axis] for axis in target) == 0
        for axes in written if not target else ():
            assert set(axes) & set(used) or size % math.prod(sizes[axis] for axis in axes)


def test_trees_are_constrained_by_the_names_of_their_parameters():
    mesh, tree = make_mesh(MESHES["all"]), abstract("decoder")
    zeros = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), unbox(tree)), replicated(mesh))

    def lay_out(params):
        return constrain_like(tree, jax.tree.map(lambda leaf: leaf + 1, params))

    found, wanted = by_name(jax.jit(within(mesh, lay_out))(zeros)), by_name(shardings_of(tree, mesh))
    for name, array in found.items():
        assert array.sharding.is_equivalent_to(wanted[name], array.ndim), name
        assert (np.asarray(array) == 1).all(), name
    # Outside a mesh the function returns the arrays unchanged.
    elsewhere = zip(jax.tree.leaves(constrain_like(tree, zeros)), jax.tree.leaves(zeros), strict=True)
    assert all(array is given for array, given in elsewhere)


def test_a_mesh_is_in_force_within_its_function_alone():
    """Even within the function of another mesh, and after an error."""
    all_axes, model = make_mesh(MESHES["all"]), make_mesh(MESHES["model"])
    names, shape = ("batch", "heads"), (8, 8)

    def inner():
        return spec_within(shape, *names)

    def outer():
        return inner(), within(model, inner)(), inner()

    split = P(("data", "fsdp"), "model")
    assert within(all_axes, outer)() == (split, split, split)
    assert inner() is None

    def odd():
        # Eight devices cannot divide an axis of six; two devices can.
        return spec_within((6, 6), None, "heads")

    assert within(all_axes, lambda: (odd(), within(model, odd)(), odd()))() == (
        P(None, "model"),
        P(None, None),
        P(None, "model"),
    )
    with pytest.raises(ZeroDivisionError):
        within(all_axes, lambda: 1 // 0)()
    assert inner() is None


def test_the_parts_of_an_axis_are_those_of_its_rule_within_a_mesh():
    all_axes = make_mesh(MESHES["all"])  # Two devices along each of three axes.
    found = within(all_axes, lambda: [parts_within(*axis) for axis in ((8, "vocab"), (7, "vocab"), (8, "batch"))])()
    assert found == [2, 1, 4]
    assert within(all_axes, lambda: parts_within(8, "kv"))() == 1
    assert parts_within(8, "vocab") == 1


def test_a_function_within_a_mesh_keeps_its_name_and_arguments():
    def total(a, *, b):
        """The sum."""
        return a + b

    wrapped = within(make_mesh(MESHES["data"]), total)
    assert (wrapped(1, b=2), wrapped.__name__, wrapped.__doc__) == (3, "total", "The sum.")
