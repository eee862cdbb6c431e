"""Measures of policies and judges; expected values are worked out by hand, or from the parts of a measure."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import Unigram, make_batch, random_params

from alignment_gap.evaluation.batching import Batching
from alignment_gap.evaluation.measures import agreed, classified, diverged, judged
from alignment_gap.evaluation.metrics import make_divergence
from alignment_gap.judges import PROBABILITIES, REWARDS, Judge

# Eleven prompts in batches of eight: the second batch is padded.
PROMPTS = make_batch(11, vocabulary_size=16)


def host(batch):
    return jax.tree.map(np.asarray, batch)


@pytest.fixture(scope="module")
def batching(mesh):
    return Batching(mesh, 8, ((6, 5),))


def responses(*rows):
    """Token ids and lengths from ragged rows."""
    width = max(map(len, rows))
    tokens = np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int32)
    return tokens, np.array([len(row) for row in rows], np.int32)


def totals(prompts, prompt_lengths, texts, lengths):
    """The sum of a response's tokens and the first token of its prompt."""
    inside = jnp.arange(texts.shape[-1]) < lengths[..., None]
    return (jnp.where(inside, texts, 0).sum(-1) + prompts[:, :1]).astype(jnp.float32)


def odds(*texts):
    """The probability of each of two responses, from their totals: a / (a + b)."""
    values = totals(*texts)
    return values / values.sum(-1, keepdims=True)


SUMS = Judge(totals, REWARDS, {})
ODDS = Judge(odds, PROBABILITIES, {})


def plain(rows):
    """The total of each response, in plain Python."""
    return [sum(row) + int(prompt[0]) for row, prompt in zip(rows, np.asarray(PROMPTS.prompts), strict=True)]


OURS = [[k + 1, 2] for k in range(11)]
# Wider arrays than ours, and responses of other lengths.
THEIRS = {"even": OURS, "long": [[3] * (1 + k % 4) for k in range(11)], "short": [[6] for _ in range(11)]}


def test_rewards_compare_with_every_opponent(batching):
    opponents = {name: responses(*rows) for name, rows in THEIRS.items()}
    found = judged({"sum": SUMS}, batching, host(PROMPTS), responses(*OURS), opponents)
    assert found.keys() == {"reward.sum", "win_rate.sum.even", "win_rate.sum.long", "win_rate.sum.short"}
    ours = plain(OURS)
    np.testing.assert_array_equal(found["reward.sum"], ours)
    for name, rows in THEIRS.items():
        expected = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, plain(rows), strict=True)]
        np.testing.assert_array_equal(found[f"win_rate.sum.{name}"], expected)
    np.testing.assert_array_equal(found["win_rate.sum.even"], 0.5)
    assert 0 < found["win_rate.sum.long"].mean() < 1


def test_probabilities_are_taken_as_they_are_and_are_no_rewards(batching):
    opponents = {name: responses(*rows) for name, rows in THEIRS.items()}
    found = judged({"odds": ODDS}, batching, host(PROMPTS), responses(*OURS), opponents)
    assert found.keys() == {"win_rate.odds.even", "win_rate.odds.long", "win_rate.odds.short"}
    for name, rows in THEIRS.items():
        expected = [a / (a + b) for a, b in zip(plain(OURS), plain(rows), strict=True)]
        np.testing.assert_allclose(found[f"win_rate.odds.{name}"], expected, rtol=1e-6)
        assert found[f"win_rate.odds.{name}"].dtype == np.float64


def test_two_judges_are_both_asked(batching):
    opponents = {"long": responses(*THEIRS["long"])}
    found = judged({"sum": SUMS, "odds": ODDS}, batching, host(PROMPTS), responses(*OURS), opponents)
    assert found.keys() == {"reward.sum", "win_rate.sum.long", "win_rate.odds.long"}


def test_without_opponents_rewards_are_measured_alone(batching):
    found = judged({"sum": SUMS, "odds": ODDS}, batching, host(PROMPTS), responses(*OURS), {})
    np.testing.assert_array_equal(found["reward.sum"], plain(OURS))
    assert found.keys() == {"reward.sum"}


def test_kl_is_measured_on_the_first_prompts(batching, even_policy, mesh):
    params, reference = random_params(even_policy, 0), random_params(even_policy, 1)
    answers = responses(*[[k + 1, 2, 3][: 1 + k % 3] for k in range(9)])
    found = diverged(even_policy, params, reference, batching, host(PROMPTS), answers)
    assert found.keys() == {"kl"} and found["kl"].shape == (9,)
    rows = (PROMPTS.prompts[:8], PROMPTS.prompt_lengths[:8], answers[0][:8, None], answers[1][:8, None])
    expected = make_divergence(even_policy, mesh)(params, reference, *map(jnp.asarray, rows))
    np.testing.assert_allclose(found["kl"][:8], expected, rtol=1e-6)
    assert found["kl"].min() > 0


def test_a_policy_is_classified_by_hand(batching):
    """Responses have one token, policies are unigrams. Ours has the logits -1 to 1, the reference is uniform."""
    tokens = np.array([[15, 0], [0, 15], [7, 7], [3, 9]] * 2, np.int32)
    pairs = dataclasses.replace(
        host(make_batch(8)),
        responses=tokens[..., None],
        response_lengths=np.ones((8, 2), np.int32),
        scores=np.array([[1.0, 0.0]] * 4 + [[0.25, 0.75]] * 4, np.float32),
    )
    policy = Unigram()
    found = classified(policy, policy.init(None), {"logits": jnp.zeros(16)}, batching, pairs)
    normalizer = math.log(sum(math.exp(-1 + 2 * i / 15) for i in range(16)))
    ratios = -1 + 2 * tokens / 15 - normalizer + math.log(16)
    np.testing.assert_array_equal(found["accuracy"], [1, 0, 0.5, 0, 0, 1, 0.5, 1])
    chosen = np.concatenate([ratios[:4, 0], ratios[4:, 1]])
    rejected = np.concatenate([ratios[:4, 1], ratios[4:, 0]])
    np.testing.assert_allclose(found["chosen_log_ratio"], chosen, rtol=1e-5)
    np.testing.assert_allclose(found["rejected_log_ratio"], rejected, rtol=1e-5)


def test_a_judge_agrees_with_labels_and_with_other_judges(batching):
    """Agreement is 1 for the same preferred response, 0 for different ones, 0.5 if one or both are undecided."""
    pairs = dataclasses.replace(
        host(make_batch(5)),
        prompts=np.zeros((5, 6), np.int32),
        responses=np.array([[[5], [2]], [[1], [4]], [[3], [3]], [[9], [1]], [[7], [7]]], np.int32),
        response_lengths=np.ones((5, 2), np.int32),
        scores=np.array([[0.8, 0.2], [1, 0], [1, 0], [0.5, 0.5], [0.5, 0.5]], np.float32),
    )
    others = {"odds": ODDS, "itself": SUMS}
    found = agreed(SUMS, others, batching, pairs, "probabilities")
    assert found.keys() == {"accuracy", "agreement.odds", "agreement.itself"}
    np.testing.assert_array_equal(found["accuracy"], [1.0, 0.0, 0.5, 0.5, 0.5])
    # Two equal responses leave every judge undecided, also beside itself.
    np.testing.assert_array_equal(found["agreement.itself"], [1.0, 1.0, 0.5, 1.0, 0.5])
    np.testing.assert_array_equal(found["agreement.odds"], [1.0, 1.0, 0.5, 1.0, 0.5])
