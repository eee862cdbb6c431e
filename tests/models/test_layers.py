"""Layers equal plain definitions of what they compute."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import attention, relative_bucket
from tiny_models import CONFIGS, make_batch

from alignment_gap.models import make_policy, response_hidden
from alignment_gap.models.layers import (
    RMSNorm,
    Segment,
    attend,
    causal_mask,
    extend_cache,
    heads_first,
    prefix_mask,
    projection,
    relative_position_bucket,
)
from alignment_gap.models.quantized import quantize_rows
from alignment_gap.sharding import unbox


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 12), (16, 64)])
def test_relative_position_buckets_follow_the_rule_of_t5(bidirectional, buckets, max_distance):
    distances = np.arange(-2 * max_distance, 2 * max_distance + 1)
    settings = {"bidirectional": bidirectional, "buckets": buckets, "max_distance": max_distance}
    expected = [relative_bucket(int(d), **settings) for d in distances]
    traced = jax.jit(lambda d: relative_position_bucket(d, bidirectional, buckets, max_distance))
    np.testing.assert_array_equal(traced(jnp.asarray(distances)), expected)
    assert set(expected) == set(range(buckets)) - ({buckets // 2} if bidirectional else set())


def test_buckets_by_hand():
    # 8 buckets in one direction: 0 to 3 are exact; then buckets begin at 4, 8, 16 and 32, up to 64.
    distances = -jnp.array([-5, 0, 1, 3, 4, 7, 8, 15, 16, 31, 32, 63, 1000])
    buckets = relative_position_bucket(distances, False, 8, 64)
    np.testing.assert_array_equal(buckets, [0, 0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7])


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_the_float32_logarithms_of_t5x_and_transformers(bidirectional):
    """T5X adds an epsilon inside the logarithm, transformers does not.

    At T5's sizes all distances get the same buckets.
    """
    distances = np.arange(-512, 513)
    buckets = 16 if bidirectional else 32
    exact, near = buckets // 2, np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    offset = np.where(distances > 0, 16, 0) if bidirectional else 0
    ours = relative_position_bucket(jnp.asarray(distances), bidirectional, 32, 128)
    for epsilon in (np.finfo(np.float32).eps, np.float32(0)):
        ratio = np.log(np.maximum(near, 1).astype(np.float32) / np.float32(exact) + epsilon)
        far = ratio / np.float32(np.log(128 / exact)) * np.float32(buckets - exact)
        far = np.minimum(exact + far.astype(np.int32), buckets - 1)
        np.testing.assert_array_equal(ours, offset + np.where(near < exact, near, far))


@pytest.mark.parametrize(
    ("key_heads", "soft_cap", "int8"),
    [*((heads, cap, False) for heads in (1, 2, 4) for cap in (None, 0.7)), (1, 0.7, True), (4, None, True)],
)
def test_attend_is_softmax_over_both_segments(key_heads, soft_cap, int8):
    """Shared keys and values in int8 are the rounded ones."""
    rng = np.random.default_rng(0)
    b, k, q, shared, own, heads, size = 2, 3, 4, 5, 6, 4, 7
    query = _normal(rng, b, k, q, heads, size)
    shared_keys, shared_values = _normal(rng, 2, b, shared, key_heads, size)
    own_keys, own_values = _normal(rng, 2, b, k, own, key_heads, size)
    shared_mask, own_mask = rng.random((b, 1, 1, shared)) < 0.6, rng.random((b, k, q, own)) < 0.6
    own_mask[..., 0] = True
    bias = _normal(rng, heads, q, own)
    in_cache = heads_first(jnp.asarray(shared_keys), jnp.asarray(shared_values))
    if int8:
        in_cache = tuple(map(quantize_rows, in_cache))
        # The same by hand: each row of a head is rounded to 127 steps of its largest number.
        shared_keys, shared_values = (
            np.round(rows / step) * step
            for rows in (shared_keys, shared_values)
            for step in [np.abs(rows).max(-1, keepdims=True) / 127]
        )
    segments = [
        Segment(*in_cache, shared_mask),
        Segment(*heads_first(jnp.asarray(own_keys), jnp.asarray(own_values)), own_mask, bias),
    ]
    output = jax.jit(partial(attend, scale=0.3, soft_cap=soft_cap))(query, segments)
    full_bias = np.concatenate([np.zeros((heads, q, shared)), bias], -1)
    for i, j in np.ndindex(b, k):
        expected = attention(
            query[i, j],
            np.concatenate([shared_keys[i], own_keys[i, j]]),
            np.concatenate([shared_values[i], own_values[i, j]]),
            bias=full_bias,
            mask=np.concatenate([np.broadcast_to(shared_mask[i, 0], (q, shared)), own_mask[i, j]], -1),
            scale=0.3,
            soft_cap=soft_cap,
        )
        np.testing.assert_allclose(output[i, j], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("form", "start"), [("scale", 1.0), ("one_plus_scale", 0.0)])
def test_norm_by_hand(form, start):
    # The mean square of (3, 4) is 12.5, with epsilon 16.
    norm = RMSNorm(epsilon=3.5, form=form, axis="kv")
    x = jnp.array([3.0, 4.0])
    boxed = norm.init(jax.random.key(0), x)["params"]["scale"]
    assert boxed.names == ("kv",)
    np.testing.assert_array_equal(boxed.value, [start, start])
    scale = {"scale": jnp.array([2.0, 1.0]) - (1.0 - start)}
    np.testing.assert_allclose(norm.apply({"params": scale}, x), [1.5, 1.0], rtol=1e-6)


def test_attend_is_finite_where_a_whole_row_is_masked():
    rng = np.random.default_rng(1)
    query, keys = (jnp.asarray(_normal(rng, *shape)) for shape in ((1, 1, 2, 1, 3), (1, 1, 4, 3)))
    segment = Segment(keys, keys, jnp.zeros((1, 1, 1, 4), bool))

    def total(query):
        return attend(query, [segment], scale=1.0).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(query)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_rows_of_zeros_stay_zeros_in_int8():
    rows = quantize_rows(jnp.array([[0.0, 0.0], [-2.0, 1.0]]))
    assert rows.values.dtype == jnp.int8 and rows.shape == (2, 2)
    np.testing.assert_array_equal(rows.values, [[0, 0], [-127, 64]])
    np.testing.assert_allclose(rows.scale, [1, 2 / 127])


def test_causal_mask_by_hand():
    queries, keys = jnp.array([1, 3]), jnp.arange(4)
    np.testing.assert_array_equal(causal_mask(queries, keys)[0, 0], [[1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(causal_mask(queries, keys, 2)[0, 0], [[1, 1, 0, 0], [0, 0, 1, 1]])


def test_prefix_mask_by_hand():
    np.testing.assert_array_equal(prefix_mask(jnp.array([0, 2, 3]), 3)[:, 0, 0], [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("places", [3, 4])
def test_a_cache_is_written_at_its_layer_and_step_and_read_up_to_its_places(places):
    cache, new = jnp.zeros((3, 1, 2, 1, 4, 1)), jnp.ones((1, 2, 1, 1, 1))
    written, own = extend_cache((cache, cache - 1), (new, 2 * new), jnp.int32(1), jnp.int32(2), places)
    for whole, of_layer, before, added in zip(written, own, (0, -1), (1, 2), strict=True):
        expected = np.full((3, 1, 2, 1, 4, 1), before)
        expected[1, :, :, :, 2] = added
        np.testing.assert_array_equal(whole, expected)
        np.testing.assert_array_equal(of_layer, expected[1, :, :, :, :places])


@pytest.mark.parametrize(("features", "inputs", "kernel"), [((2, 3), 1, "btd,dhc->bthc"), (3, 2, "bhc,hcd->bd")])
def test_a_projection_and_its_gradients_are_those_of_the_matrix_product(features, inputs, kernel):
    rng = np.random.default_rng(2)
    x, axes = _normal(rng, 5, 4, 3), ("a",) * (inputs + (1 if isinstance(features, int) else len(features)))
    module = projection(features, axes, inputs=inputs, dtype=jnp.float32)
    params = jax.tree.map(
        lambda box: box.value, module.init(jax.random.key(0), x), is_leaf=lambda x: hasattr(x, "names")
    )
    weight = _normal(rng, *module.apply(params, x).shape)

    def ours(params, x):
        return (module.apply(params, x) * weight).sum()

    def plain(params, x):
        return (jnp.einsum(kernel, x, params["params"]["kernel"]) * weight).sum()

    for got, expected in zip(*(jax.tree.leaves(jax.grad(f, (0, 1))(params, x)) for f in (ours, plain)), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_remat_keeps_projections_where_it_is_told_to(architecture):
    """Counts products in the gradient. "dots" computes those of attention again, "full" computes all of them again."""
    products = {}
    for remat in ("none", "dots", "full"):
        policy = make_policy(dataclasses.replace(CONFIGS[architecture], remat=remat))
        batch = make_batch(2)
        arrays = batch.prompts, batch.prompt_lengths, batch.responses

        def total(params, policy=policy, arrays=arrays):
            return response_hidden(policy, params, *arrays).sum()

        params = unbox(jax.eval_shape(policy.init, jax.random.key(0)))
        products[remat] = str(jax.make_jaxpr(jax.grad(total))(params)).count("dot_general[")
    assert products["none"] < products["dots"] < products["full"]
    # The last products of a layer's sums are not computed again: 2 of 18 in T5; 4 of 14 in the decoder (prompt,
    # response).
    assert products["full"] - products["dots"] == {"t5": 16, "decoder": 10}[architecture]
