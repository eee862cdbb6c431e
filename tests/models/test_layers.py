"""Layers against plain statements of what they compute."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import attention, relative_bucket

from alignment_gap.models.layers import Segment, attend, prefix_mask, relative_position_bucket, rotate, update_cache


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
    # 8 buckets one way: 0 to 3 exact, then log2 steps up to 64: from 4, from 8, from 16, from 32.
    distances = -jnp.array([-5, 0, 1, 3, 4, 7, 8, 15, 16, 31, 32, 63, 1000])
    buckets = relative_position_bucket(distances, False, 8, 64)
    np.testing.assert_array_equal(buckets, [0, 0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7])


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attend_is_softmax_over_both_segments(key_heads):
    rng = np.random.default_rng(0)
    b, k, q, shared, own, heads, size = 2, 3, 4, 5, 6, 4, 7
    query = _normal(rng, b, k, q, heads, size)
    shared_keys, shared_values = _normal(rng, 2, b, shared, key_heads, size)
    own_keys, own_values = _normal(rng, 2, b, k, own, key_heads, size)
    shared_mask, own_mask = rng.random((b, 1, 1, shared)) < 0.6, rng.random((b, k, q, own)) < 0.6
    own_mask[..., 0] = True
    bias = _normal(rng, heads, q, own)
    segments = [Segment(shared_keys, shared_values, shared_mask), Segment(own_keys, own_values, own_mask, bias)]
    output = jax.jit(partial(attend, scale=0.3))(query, segments)
    full_bias = np.concatenate([np.zeros((heads, q, shared)), bias], -1)
    for i, j in np.ndindex(b, k):
        expected = attention(
            query[i, j],
            np.concatenate([shared_keys[i], own_keys[i, j]]),
            np.concatenate([shared_values[i], own_values[i, j]]),
            bias=full_bias,
            mask=np.concatenate([np.broadcast_to(shared_mask[i, 0], (q, shared)), own_mask[i, j]], -1),
            scale=0.3,
        )
        np.testing.assert_allclose(output[i, j], expected, rtol=1e-5, atol=1e-6)


def test_attend_is_finite_where_a_whole_row_is_masked():
    rng = np.random.default_rng(1)
    query, keys = _normal(rng, 1, 1, 2, 1, 3), _normal(rng, 1, 4, 1, 3)
    segment = Segment(keys, keys, np.zeros((1, 1, 1, 4), bool))

    def total(query):
        return attend(query, [segment], scale=1.0).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.asarray(query))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_rotated_dot_products_depend_on_the_relative_position_only():
    rng = np.random.default_rng(2)
    query, key = jnp.asarray(_normal(rng, 8)), jnp.asarray(_normal(rng, 8))

    @jax.jit
    def dot(query_position, key_position):
        def turn(x, position):
            return rotate(x[None, None], position[None], 10000.0)[0, 0]

        return turn(query, query_position) @ turn(key, key_position)

    np.testing.assert_allclose(dot(*jnp.array([3, 1])), dot(*jnp.array([103, 101])), rtol=1e-4)
    np.testing.assert_allclose(dot(*jnp.array([7, 7])), query @ key, rtol=1e-5)
    assert abs(dot(*jnp.array([3, 1])) - dot(*jnp.array([3, 2]))) > 1e-2


def test_rotation_by_hand():
    # One pair of components, frequency 1: a quarter turn takes (1, 0) to (0, 1), up to the angle of one radian a step.
    turned = rotate(jnp.array([[[1.0, 0.0]]]), jnp.array([2]), 10000.0)
    np.testing.assert_allclose(turned[0, 0], [np.cos(2.0), np.sin(2.0)], rtol=1e-6)


def test_rotation_keeps_lengths():
    x = jnp.asarray(_normal(np.random.default_rng(3), 5, 2, 6))
    turned = rotate(x, jnp.arange(5), 100.0)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_prefix_mask_by_hand():
    np.testing.assert_array_equal(prefix_mask(jnp.array([0, 2, 3]), 3)[:, 0, 0], [[0, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_a_cache_is_written_at_its_step_only():
    cache, new = jnp.zeros((1, 2, 4, 1, 1)), jnp.ones((1, 2, 1, 1, 1))
    keys, values = update_cache((cache, cache - 1), (new, 2 * new), jnp.int32(2))
    np.testing.assert_array_equal(keys[0, 1, :, 0, 0], [0, 0, 1, 0])
    np.testing.assert_array_equal(values[0, 1, :, 0, 0], [-1, -1, 2, -1])
    assert update_cache(None, (new, new), None)[0] is new
