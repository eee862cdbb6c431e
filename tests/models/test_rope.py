"""Rotary positions by hand and by their invariances; their scalings equal plain definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import rope_frequencies

from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, make_policy
from alignment_gap.models.rope import frequencies, rotate, rotation

CONFIG = DecoderConfig(head_size=8)
LLAMA = DecoderConfig(head_size=128, rope_base=500000.0, rope_scaling="llama3", rope_scaling_factor=8.0)


def _normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def test_rotated_dot_products_depend_on_the_relative_position_only():
    rng = np.random.default_rng(2)
    query, key = jnp.asarray(_normal(rng, 8)), jnp.asarray(_normal(rng, 8))

    @jax.jit
    def dot(query_position, key_position):
        def turn(x, position):
            return rotate(x[None, None], rotation(position[None], frequencies(CONFIG)))[0, 0]

        return turn(query, query_position) @ turn(key, key_position)

    np.testing.assert_allclose(dot(*jnp.array([3, 1])), dot(*jnp.array([103, 101])), rtol=1e-4)
    np.testing.assert_allclose(dot(*jnp.array([7, 7])), query @ key, rtol=1e-5)
    assert abs(dot(*jnp.array([3, 1])) - dot(*jnp.array([3, 2]))) > 1e-2


def test_rotation_by_hand():
    # One pair with frequency 1: position 2 turns (1, 0) by 2 radians.
    turned = rotate(jnp.array([[[1.0, 0.0]]]), rotation(jnp.array([2]), np.ones(1)))
    np.testing.assert_allclose(turned[0, 0], [np.cos(2.0), np.sin(2.0)], rtol=1e-6)


def test_rotation_keeps_lengths():
    x = jnp.asarray(_normal(np.random.default_rng(3), 5, 2, 6))
    turned = rotate(x, rotation(jnp.arange(5), np.array([1.0, 0.1, 0.01])))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_frequencies_by_hand():
    np.testing.assert_allclose(frequencies(CONFIG), [1.0, 0.1, 0.01, 0.001])
    linear = dataclasses.replace(CONFIG, rope_scaling="linear", rope_scaling_factor=4.0, rope_local_base=16.0)
    np.testing.assert_allclose(frequencies(linear), [0.25, 0.025, 0.0025, 0.00025])
    np.testing.assert_allclose(frequencies(linear, local=True), [1.0, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(frequencies(dataclasses.replace(linear, rope_local_base=None), local=True)[0], 0.25)


def test_llama_slows_only_what_turns_seldom_in_the_original_context():
    plain, scaled = frequencies(dataclasses.replace(LLAMA, rope_scaling="none")), frequencies(LLAMA)
    np.testing.assert_allclose(scaled, rope_frequencies(LLAMA, local=False), rtol=1e-12)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-12)
    assert ((wavelength >= 2048) & (wavelength <= 8192)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn': choose one of none, linear, llama3"),
        ({"rope_scaling_factor": 8.0}, "rope_scaling_factor is 8.0 without a scaling: set rope_scaling"),
        ({"rope_low_frequency_factor": 4.0}, "rope_high_frequency_factor is 4.0: it must be above"),
    ],
)
def test_scalings_that_contradict_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_policy(dataclasses.replace(CONFIG, **change))
