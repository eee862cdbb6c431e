"""T5's fused attention in Pallas's interpreter equals the plain form, for rows of any length and for packed rows.

Values and gradients of single calls agree within 1e-5 of the largest in float32, and within 2e-2 in bfloat16. One
form rounds the weights before it normalises them, the other one after that.
"""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CONFIGS, EVEN_CONFIGS, make_batch, random_params, texts

from alignment_gap.errors import UserError
from alignment_gap.models import T5Config, layers, make_policy, score, t5_attention
from alignment_gap.models.packing import Packing, Ranges
from alignment_gap.plan.programs import TPU_VARIABLES
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh, shardings_of, within

BATCH = make_batch(4, responses=3)
FARTHEST = 12
BIAS = layers.RelativePositionBias(8, FARTHEST, 2, True)


def _plain(query, keys, values, ranges, bias=None):
    key = jnp.arange(keys.shape[-3])
    mask = (key >= ranges.begin[..., None]) & (key < ranges.end[..., None])
    segment = layers.Segment(*layers.heads_first(keys, values), mask, bias)
    return layers.attend(query, [segment], scale=1.0)


def _ranges(rng, shape, size):
    """Ranges of all kinds: whole rows, one key, no key."""
    begin, end = np.sort(rng.integers(0, size + 1, (2, *shape)), axis=0)
    begin[0, 0, 0], end[0, 0, 0] = 0, size
    begin[-1, -1, -1], end[-1, -1, -1] = 3, 3
    return Ranges(jnp.asarray(begin, jnp.int32), jnp.asarray(end, jnp.int32))


def _both(fused, plain, arrays, ranges):
    """Outputs and gradients of both forms.

    The gradient is that of a sum; queries with keys have random weights in it.
    """
    shape = arrays[0].shape
    weights = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    weights *= (ranges.end > ranges.begin)[..., None, None].astype(jnp.float32)

    def total(form, *arrays):
        output = form(*arrays).astype(jnp.float32) * weights
        return output.sum(), output

    def of(form):
        (_, output), gradients = jax.jit(
            jax.value_and_grad(partial(total, form), tuple(range(len(arrays))), has_aux=True)
        )(*arrays)
        return output, *gradients

    return of(fused), of(plain)


def _assert_near(fused, plain, bound):
    for ours, theirs in zip(fused, plain, strict=True):
        ours, theirs = (np.asarray(x.astype(jnp.float32)) for x in (ours, theirs))
        assert np.abs(ours - theirs).max() <= bound * max(np.abs(theirs).max(), 1.0)


def _arrays(rng, *shapes, dtype="float32"):
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("length", "most", "dtype", "bound"),
    [(1, 16, "float32", 1e-5), (37, 16, "float32", 1e-5), (64, 16, "float32", 1e-5), (90, 32, "bfloat16", 2e-2)],
)
@pytest.mark.parametrize("bidirectional", [True, False])
def test_self_attention_equals_the_plain_form(length, most, dtype, bound, bidirectional):
    """The bias's table has a gradient too. In rows of 64, all tiles far from the diagonal share a bias."""
    rng = np.random.default_rng(length)
    arrays = _arrays(rng, *[(2, 2, length, 2, 5)] * 3, dtype=dtype)
    table = {"params": {"rel_embedding": jnp.asarray(rng.normal(size=(2, 8)), jnp.float32)}}
    module = BIAS.clone(bidirectional=bidirectional)
    ranges = _ranges(rng, (2, 2, length), length) if bidirectional else Ranges.causal((2, 2, length))

    def fused(query, keys, values, table):
        distances = jnp.asarray(t5_attention.line_distances(length, FARTHEST, most))
        line = module.apply(table, jnp.zeros(1, jnp.int32), distances)[:, 0]
        return t5_attention.make(ranges, line, most)(query, keys, values)

    def plain(query, keys, values, table):
        return _plain(query, keys, values, ranges, module.apply(table, jnp.arange(length), jnp.arange(length)))

    def of_table(form):
        return lambda query, keys, values, rows: form(query, keys, values, {"params": {"rel_embedding": rows}})

    arrays.append(table["params"]["rel_embedding"])
    _assert_near(*_both(of_table(fused), of_table(plain), arrays, ranges), bound)


@pytest.mark.parametrize(("heads", "size"), [(4, 64), (2, 128), (3, 24)])
def test_k_rows_attend_to_the_keys_of_their_prompt(heads, size):
    """Two heads of size 64 share a block of lanes, one of 128 fills it, three of 24 need padding."""
    rng = np.random.default_rng(heads)
    arrays = _arrays(rng, (2, 3, 7, heads, size), *[(2, 21, heads, size)] * 2)
    arrays[0] *= size**-0.5
    ranges = _ranges(rng, (2, 3, 7), 21)
    fused = t5_attention.make(ranges, most=16)
    _assert_near(*_both(fused, lambda *arrays: _plain(*arrays, ranges), arrays, ranges), 1e-5)


def test_queries_without_keys_give_zero_and_no_gradient():
    rng = np.random.default_rng(0)
    arrays = _arrays(rng, *[(1, 1, 20, 2, 5)] * 3)
    none = Ranges(*[jnp.full((1, 1, 20), 4)] * 2)
    attend = t5_attention.make(none, jnp.zeros((2, len(t5_attention.line_distances(20, FARTHEST, 16)))), 16)
    output, pullback = jax.vjp(attend, *arrays)
    assert not output.any()
    assert not any(gradient.any() for gradient in pullback(jnp.ones_like(output)))


@pytest.mark.parametrize(("length", "most"), [(5, 16), (16, 16), (40, 16), (100, 32)])
def test_the_line_has_every_distance_of_the_tiles(length, most):
    """The line, rotated right by k, has the distances from key k to all queries, up to distances of equal bias."""
    line, block = t5_attention.line_distances(length, FARTHEST, most), t5_attention.block_of(length, most)
    turned = np.stack([np.roll(line, key) for key in range(block)])
    tiles = len(line) // block - 1
    key, query = np.arange(length), np.arange(length)[:, None]
    tile = np.clip(query // block - key // block, -(tiles // 2), tiles // 2) + tiles // 2
    found = turned[key % block, tile * block + query % block]
    np.testing.assert_array_equal(np.clip(found, -FARTHEST, FARTHEST), np.clip(key - query, -FARTHEST, FARTHEST))


def test_ranges_of_packed_rows_are_their_masks():
    """For any lengths. Padding attends to nothing."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(0, 4, (2, 3, 3))
        packing = Packing.of(jnp.asarray(lengths[..., 0]), jnp.asarray(lengths[..., 1:]), 10, 11)
        is_prompt = packing.prompts.slot[:, None] < 3
        causal = layers.causal_mask(jnp.arange(11), jnp.arange(11))
        for ranges, mask, text in (
            (packing.prompt_ranges(), packing.within_prompts(), is_prompt),
            (packing.causal_ranges(), packing.within_responses() & causal, packing.is_response),
            (packing.across_ranges(), packing.across(), packing.is_response),
        ):
            key = np.arange(mask.shape[-1])
            found = (key >= ranges.begin[..., None]) & (key < ranges.end[..., None])
            np.testing.assert_array_equal(found, mask & text[..., None])


def _value_and_gradient(config, params, batch=BATCH):
    def total(params):
        log_probs = score(make_policy(config), params, *texts(batch))
        return jnp.sum(log_probs * jnp.linspace(0.5, 1.5, log_probs.size).reshape(log_probs.shape)), log_probs

    (_, log_probs), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return log_probs, gradient


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_t5_scores_as_with_the_plain_form(remat):
    config = CONFIGS["t5"]
    params = random_params(make_policy(config), 2)
    plain = _value_and_gradient(config, params)
    fused = _value_and_gradient(dataclasses.replace(config, attention="pallas", remat=remat), params)
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-5, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), fused[1], plain[1])


@pytest.mark.slow
def test_t5_over_a_mesh_scores_as_on_one_device():
    """Batch and heads are split. The gradient of the position biases is summed over the batch."""
    policy = make_policy(dataclasses.replace(EVEN_CONFIGS["t5"], attention="pallas"))
    params, mesh = random_params(policy), make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    gradient = jax.value_and_grad(lambda params, *texts: score(policy, params, *texts).sum())
    alone = jax.jit(gradient)(params, *texts(BATCH))
    split = jax.device_put(params, shardings_of(jax.eval_shape(policy.init, jax.random.key(0)), mesh))
    over_mesh = jax.jit(within(mesh, gradient))(split, *jax.device_put(texts(BATCH), batch_sharding(mesh)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), over_mesh, alone)


@pytest.mark.parametrize("platform", ["tpu", "cpu", "gpu"])
def test_t5_takes_the_kernel_on_tpus_unasked(platform, monkeypatch):
    calls = []
    monkeypatch.setattr("alignment_gap.models.t5.platform", lambda: platform)
    monkeypatch.setattr(t5_attention, "make", lambda *given: calls.append(given) or (lambda query, *_: query))
    policy = make_policy(T5Config())
    jax.eval_shape(partial(score, policy), random_params(policy), *texts(BATCH))
    # The encoder has one call, the decoder two.
    assert len(calls) == (3 if platform == "tpu" else 0)


def test_the_kernel_is_refused_on_gpus(monkeypatch):
    monkeypatch.setattr("alignment_gap.models.t5.platform", lambda: "cuda")
    policy = make_policy(T5Config(attention="pallas"))
    with pytest.raises(UserError, match="attention is 'pallas' on cuda: it needs a TPU; use auto or xla"):
        jax.eval_shape(partial(score, policy), random_params(policy), *texts(BATCH))


TPU_PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from alignment_gap.models import T5Config, make_policy, score
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh, shardings_of, unbox, within

topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
devices = len(topology.devices)
mesh = make_mesh(MeshConfig(data=1, fsdp=devices // 2, model=2), topology.devices)
policy = make_policy(T5Config(
    vocabulary_size=256, width=128, heads=4, head_size=64, mlp_width=128, dtype="bfloat16", remat="full"))
boxed = jax.eval_shape(policy.init, jax.random.key(0))
params = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    unbox(boxed), shardings_of(boxed, mesh))
texts = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh))
         for shape in ((devices, 500), (devices, 3), (devices, 2, 100), (devices, 3, 2))]
step = jax.value_and_grad(lambda params, *texts: score(policy, params, *texts).sum())
lowered = jax.jit(within(mesh, step)).trace(params, *texts).lower(lowering_platforms=("tpu",))
print(lowered.compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x1", "v6e:2x4"])
def test_packed_t5_compiles_for_tpu_slices(topology):
    """Value and gradient compile ahead of time. No array in the program has the size queries x keys."""
    pytest.importorskip("libtpu", reason="libtpu compiles for TPUs ahead of time")
    process = subprocess.run(
        [sys.executable, "-c", TPU_PROGRAM, topology],
        env=os.environ | TPU_VARIABLES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    calls = [line for line in process.stdout.splitlines() if "tpu_custom_call" in line]
    # The encoder, the responses, and responses to prompts; forward runs twice, because of remat.
    assert sum("t5_attention_forward" in line for line in calls) == 6
    assert sum("t5_attention_backward" in line for line in calls) == 3
    assert "500,500]" not in process.stdout and "512,512]" not in process.stdout
