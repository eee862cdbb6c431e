"""Metrics against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_models import log_softmax, logits_of
from tiny_models import make_batch, random_params, texts

from alignment_gap.evaluation.metrics import classification, in_batches, make_divergence, make_judge
from alignment_gap.models import PreferenceModel
from alignment_gap.models.preference import Markers

BATCH = make_batch(8, vocabulary_size=16, responses=1)


@pytest.fixture(scope="module")
def divergence(even_policy, mesh):
    return make_divergence(even_policy, mesh)


def test_kl_is_the_sum_over_the_vocabulary_at_every_token(divergence, even_policy):
    params, reference = random_params(even_policy, 0), random_params(even_policy, 1)
    expected = []
    for b in range(8):
        prompt = np.asarray(BATCH.prompts)[b, : int(BATCH.prompt_lengths[b])]
        response = np.asarray(BATCH.responses)[b, 0, : int(BATCH.response_lengths[b, 0])]
        p, q = (log_softmax(logits_of(even_policy.config, leaf, prompt, response)) for leaf in (params, reference))
        expected.append((np.exp(p) * (p - q)).sum())
    values = divergence(params, reference, *texts(BATCH))
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
    assert min(expected) > 1e-3


def test_kl_to_itself_is_exactly_zero(divergence, even_policy):
    params = random_params(even_policy)
    np.testing.assert_array_equal(divergence(params, params, *texts(BATCH)), 0.0)


def test_the_judge_is_the_sign_rule_of_the_model(mesh, even_policy):
    model, params = PreferenceModel(even_policy, Markers(11, 12, 13, 14, 15)), random_params(even_policy)
    batch = make_batch(8, vocabulary_size=11)
    responses = batch.responses.at[0, 1].set(batch.responses[0, 0])
    lengths = batch.response_lengths.at[0, 1].set(batch.response_lengths[0, 0])
    prompts = (batch.prompts, batch.prompt_lengths)
    wins = make_judge(model, mesh)(params, *prompts, responses[:, 0], lengths[:, 0], responses[:, 1], lengths[:, 1])
    np.testing.assert_array_equal(wins, jax.jit(model.preferences)(params, *prompts, responses, lengths))
    assert wins[0] == 0.5


@pytest.mark.parametrize("count", [1, 8, 11, 16])
def test_in_batches_gives_each_row_once(count, mesh):
    seen = []

    @jax.jit
    def function(numbers, rows):
        seen.append(numbers.shape)
        return {"twice": 2 * numbers, "sum": rows.sum(1)}

    numbers, rows = np.arange(count), np.arange(3.0 * count, dtype=np.float32).reshape(count, 3)
    results = in_batches(function, (numbers, rows), batch_size=8, mesh=mesh)
    np.testing.assert_array_equal(results["twice"], 2 * numbers)
    np.testing.assert_array_equal(results["sum"], rows.sum(1))
    # One shape, one compilation.
    assert seen == [(8,)]


def test_classification_by_hand():
    """Ratios of both responses: (2, -1), (-1, 2), (1, 1), (3, 0); the second, first, first, second wins."""
    reference = np.full((4, 2, 2), -1.0, np.float32)
    moves = np.array([[[1, 1], [0, -1]], [[-1, 0], [1, 1]], [[1, 0], [0, 1]], [[2, 1], [0, 0]]], np.float32)
    scores = np.array([[0, 1], [1, 0], [1, 0], [0, 1]], np.float32)
    found = classification(reference + moves, reference, scores)
    np.testing.assert_array_equal(found["accuracy"], [0.0, 0.0, 0.5, 0.0])
    np.testing.assert_array_equal(found["chosen_log_ratio"], [-1, -1, 1, 0])
    np.testing.assert_array_equal(found["rejected_log_ratio"], [2, 2, 1, 3])
    flipped = classification(reference + moves, reference, scores[:, ::-1])
    np.testing.assert_array_equal(flipped["accuracy"], [1.0, 1.0, 0.5, 1.0])


def test_kl_ignores_what_is_behind_the_end(divergence, even_policy):
    params, reference = random_params(even_policy, 0), random_params(even_policy, 1)
    padding = jnp.arange(5) >= BATCH.response_lengths[..., None]
    other = jnp.where(padding, 3, BATCH.responses)
    expected = divergence(params, reference, *texts(BATCH))
    values = divergence(params, reference, *texts(BATCH)[:2], other, BATCH.response_lengths)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
