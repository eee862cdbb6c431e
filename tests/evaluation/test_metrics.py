"""Metrics, compared with brute force and with values worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import log_softmax, logits_of
from tiny_models import MESHES, make_batch, random_params, texts

from alignment_gap.evaluation.metrics import classification, make_divergence, preferences
from alignment_gap.judges import PROBABILITIES, REWARDS
from alignment_gap.sharding import make_mesh

BATCH = make_batch(8, vocabulary_size=16, responses=1)


@pytest.fixture(scope="module")
def divergence(even_policy, mesh):
    return make_divergence(even_policy, mesh)


@pytest.fixture(scope="module")
def two(even_policy):
    """The parameters of a policy and of a reference."""
    return random_params(even_policy, 0), random_params(even_policy, 1)


@pytest.fixture(scope="module")
def found(divergence, two):
    return np.asarray(divergence(*two, *texts(BATCH)))


def test_kl_is_the_sum_over_the_vocabulary_at_every_token(found, even_policy, two):
    expected = []
    for b in range(8):
        prompt = np.asarray(BATCH.prompts)[b, : int(BATCH.prompt_lengths[b])]
        response = np.asarray(BATCH.responses)[b, 0, : int(BATCH.response_lengths[b, 0])]
        p, q = (log_softmax(logits_of(even_policy.config, leaf, prompt, response)) for leaf in two)
        expected.append((np.exp(p) * (p - q)).sum())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert min(expected) > 1e-3


def test_kl_to_itself_is_exactly_zero(divergence, two):
    np.testing.assert_array_equal(divergence(two[0], two[0], *texts(BATCH)), 0.0)


def test_kl_ignores_what_comes_after_the_end(divergence, two, found):
    padding = jnp.arange(5) >= BATCH.response_lengths[..., None]
    other = jnp.where(padding, 3, BATCH.responses)
    values = divergence(*two, *texts(BATCH)[:2], other, BATCH.response_lengths)
    np.testing.assert_allclose(values, found, rtol=1e-5)


def test_kl_is_the_same_on_another_mesh(even_policy, two, found):
    values = make_divergence(even_policy, make_mesh(MESHES["all"]))(*two, *texts(BATCH))
    np.testing.assert_allclose(values, found, rtol=1e-5)


def test_kl_is_no_distance(divergence, two, found):
    """The KL of the reference from the policy has another value."""
    assert np.abs(np.asarray(divergence(*two[::-1], *texts(BATCH))) / found - 1).max() > 0.05


def test_preferences_by_hand():
    scores = np.array([[0.75, 0.25], [0.0, 1.0], [0.5, 0.5]], np.float32)
    np.testing.assert_array_equal(preferences(scores, PROBABILITIES), [0.75, 0.0, 0.5])
    rewards = np.array([[3.0, -1.0], [-2.0, -1.0], [7.0, 7.0]], np.float32)
    found = preferences(rewards, REWARDS)
    np.testing.assert_array_equal(found, [1.0, 0.0, 0.5])
    assert found.dtype == np.float64


def test_classification_by_hand():
    """The log-ratios of both responses are (2, -1), (-1, 2), (1, 1), (3, 0); the winners are 2, 1, 1, 2."""
    reference = np.full((4, 2, 2), -1.0, np.float32)
    moves = np.array([[[1, 1], [0, -1]], [[-1, 0], [1, 1]], [[1, 0], [0, 1]], [[2, 1], [0, 0]]], np.float32)
    scores = np.array([[0, 1], [1, 0], [1, 0], [0, 1]], np.float32)
    found = classification(reference + moves, reference, scores)
    np.testing.assert_array_equal(found["accuracy"], [0.0, 0.0, 0.5, 0.0])
    np.testing.assert_array_equal(found["chosen_log_ratio"], [-1, -1, 1, 0])
    np.testing.assert_array_equal(found["rejected_log_ratio"], [2, 2, 1, 3])
    tied = classification(reference + moves, reference, np.full((4, 2), 0.5, np.float32))
    np.testing.assert_array_equal(tied["accuracy"], 0.5)
    np.testing.assert_array_equal(tied["chosen_log_ratio"], [2, -1, 1, 3])
    flipped = classification(reference + moves, reference, scores[:, ::-1])
    np.testing.assert_array_equal(flipped["accuracy"], [1.0, 1.0, 0.5, 1.0])
