"""Preference models as judges: pairs in both orders, rewards, and folders that hold something else."""

import shutil

import jax
import numpy as np
import pytest
from tiny_models import random_params

from alignment_gap.errors import UserError
from alignment_gap.judges import JudgeConfig, by_itself, open_judge
from alignment_gap.judges.preference_model import judge_network


@pytest.fixture(scope="module")
def answers(network_of, texts_on, alone):
    """The model's own log-odds [B] that the first of two responses is better, for a kind of model and an order."""
    prompts, prompt_lengths, responses, lengths = texts_on(alone, samples=3)
    models = {kind: network_of(kind).preference_model() for kind in ("pairwise", "bradley_terry")}
    log_odds = {kind: jax.jit(model.log_odds) for kind, model in models.items()}

    def ask(kind, first, second, step=2):
        order = np.array([first, second])
        rows = (prompts, prompt_lengths, responses[:, order], lengths[:, order])
        return np.asarray(log_odds[kind](random_params(models[kind].policy, step), *rows), np.float64)

    return ask


@pytest.fixture(scope="module")
def scores_of(runs, posts, texts_on, mesh):
    """The judge's scores of three responses."""

    def ask(kind, labels, step=None):
        judge = open_judge(JudgeConfig(runs[kind], step, labels), posts, mesh)
        return np.asarray(judge.scores(*texts_on(mesh, samples=3)), np.float64)

    return ask


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def shares(wins):
    """The mean preference of each of three responses, from the preferences for the first of each pair."""
    first = [(wins[0, 1] + wins[0, 2]) / 2, (1 - wins[0, 1] + wins[1, 2]) / 2, (2 - wins[0, 2] - wins[1, 2]) / 2]
    return np.stack(first, axis=1)


PAIRS = ((0, 1), (0, 2), (1, 2))


@pytest.mark.slow
def test_a_pairwise_model_is_asked_in_both_orders(answers, scores_of):
    """Hard labels compare the log-odds of both orders. Soft labels average both probabilities."""
    both = {(i, j): (answers("pairwise", i, j), answers("pairwise", j, i)) for i, j in PAIRS}
    # The model prefers one place. Otherwise the second order would change nothing.
    assert max(np.abs(shown + swapped).max() for shown, swapped in both.values()) > 0.1
    hard = {pair: (np.sign(shown - swapped) + 1) / 2 for pair, (shown, swapped) in both.items()}
    np.testing.assert_allclose(scores_of("pairwise", "hard", 2), shares(hard), atol=1e-6)
    soft = {pair: (sigmoid(shown) + 1 - sigmoid(swapped)) / 2 for pair, (shown, swapped) in both.items()}
    np.testing.assert_allclose(scores_of("pairwise", "soft", 2), shares(soft), atol=1e-5)


@pytest.mark.slow
def test_a_bradley_terry_model_compares_rewards(answers, scores_of):
    rewards = scores_of("bradley_terry", "rewards")
    margins = {(i, j): rewards[:, i] - rewards[:, j] for i, j in PAIRS}
    for i, j in PAIRS:
        np.testing.assert_allclose(answers("bradley_terry", i, j), margins[i, j], atol=1e-5)
    assert max(np.abs(margin).max() for margin in margins.values()) > 0.01
    soft = {pair: sigmoid(margin) for pair, margin in margins.items()}
    np.testing.assert_allclose(scores_of("bradley_terry", "soft"), shares(soft), atol=1e-5)
    hard = {pair: (np.sign(margin) + 1) / 2 for pair, margin in margins.items()}
    np.testing.assert_allclose(scores_of("bradley_terry", "hard"), shares(hard), atol=1e-6)


@pytest.mark.parametrize("kind", ["pairwise", "bradley_terry"])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_the_order_of_responses_does_not_matter(kind, labels, runs, posts, texts_on, mesh):
    prompts, prompt_lengths, responses, lengths = texts_on(mesh)
    judge = open_judge(JudgeConfig(runs[kind], labels=labels), posts, mesh)
    scores = judge.scores(prompts, prompt_lengths, responses, lengths)
    swapped = judge.scores(prompts, prompt_lengths, responses[:, ::-1], lengths[:, ::-1])
    np.testing.assert_allclose(swapped[:, ::-1], scores, atol=1e-6)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, rtol=1e-6)
    assert judge.kind == "probabilities"


def test_equal_responses_are_a_tie(runs, posts, texts_on, mesh):
    prompts, prompt_lengths, responses, lengths = texts_on(mesh)
    same = (prompts, prompt_lengths, responses.at[:, 1].set(responses[:, 0]), lengths.at[:, 1].set(lengths[:, 0]))
    for kind in ("pairwise", "bradley_terry"):
        for labels in ("hard", "soft"):
            judge = open_judge(JudgeConfig(runs[kind], labels=labels), posts, mesh)
            np.testing.assert_allclose(judge.scores(*same), 0.5, atol=1e-6)


@pytest.mark.parametrize(("kind", "labels"), [("pairwise", "hard"), ("pairwise", "soft"), ("bradley_terry", "rewards")])
def test_one_device_gets_the_answer_of_eight(kind, labels, runs, scores_of, posts, texts_on, alone):
    """Equal up to rounding, because sums have another order. No label changes."""
    judge = open_judge(JudgeConfig(runs[kind], labels=labels), posts, alone)
    scores = judge.scores(*texts_on(alone, samples=3))
    np.testing.assert_allclose(scores, scores_of(kind, labels), rtol=1e-5, atol=0 if labels == "hard" else 1e-5)


def test_a_step_is_that_steps_judge(answers, scores_of):
    """By default the last checkpoint judges."""
    last = scores_of("pairwise", "soft", 4)
    np.testing.assert_array_equal(scores_of("pairwise", "soft"), last)
    assert np.abs(scores_of("pairwise", "soft", 2) - last).max() > 1e-3
    soft = {
        (i, j): (sigmoid(answers("pairwise", i, j, 4)) + sigmoid(-answers("pairwise", j, i, 4))) / 2 for i, j in PAIRS
    }
    np.testing.assert_allclose(last, shares(soft), atol=1e-5)


def test_its_facts_tell_its_parameters(runs, posts, mesh, tmp_path):
    """A copy of the folder is the same judge; another step is another judge."""
    facts = open_judge(JudgeConfig(runs["pairwise"], 4), posts, mesh).facts
    shutil.copytree(runs["pairwise"], tmp_path / "copy")
    copied = open_judge(JudgeConfig(str(tmp_path / "copy")), posts, mesh).facts
    assert facts["judge"] == runs["pairwise"] and copied["judge"] == str(tmp_path / "copy")
    assert copied["judge.digest"] == facts["judge.digest"]
    assert open_judge(JudgeConfig(runs["pairwise"], 2), posts, mesh).facts["judge.digest"] != facts["judge.digest"]


def test_by_itself_it_gives_rewards_where_it_has_them(runs):
    assert by_itself(runs["pairwise"]) == JudgeConfig(runs["pairwise"], labels="hard")
    assert by_itself(runs["bradley_terry"]) == JudgeConfig(runs["bradley_terry"], labels="rewards")


def test_scores_stay_on_the_devices(runs, posts, texts_on, mesh):
    texts = texts_on(mesh)
    judge = open_judge(by_itself(runs["pairwise"]), posts, mesh)
    with jax.transfer_guard("disallow"):
        scores = judge.scores(*texts)
    assert scores.sharding.is_equivalent_to(texts[-1].sharding, 2)


def test_a_preference_needs_two_responses_and_a_reward_one(runs, posts, texts_on, mesh):
    single = texts_on(mesh, samples=1)
    with pytest.raises(UserError, match="1 response a prompt: a preference needs 2 or more"):
        open_judge(JudgeConfig(runs["pairwise"]), posts, mesh).scores(*single)
    rewards = open_judge(JudgeConfig(runs["bradley_terry"], labels="rewards"), posts, mesh).scores(*single)
    assert rewards.shape == (8, 1)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("policy", "hard", "is a policy: give the folder of a preference model"),
        ("pairwise", "rewards", "labels is 'rewards', but .*/pairwise compares pairs: choose hard or soft"),
    ],
)
def test_a_run_that_cannot_be_this_judge_is_told_from_its_metadata(kind, labels, message, runs, posts, mesh):
    for refused in (lambda c: open_judge(c, posts, mesh), judge_network):
        with pytest.raises(UserError, match=message):
            refused(JudgeConfig(runs[kind], labels=labels))


def test_a_folder_without_a_checkpoint_is_one_line(posts, mesh, tmp_path, runs):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=str(folder)) as error:
            open_judge(JudgeConfig(str(folder)), posts, mesh)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="3"):
        open_judge(JudgeConfig(runs["pairwise"], 3), posts, mesh)


def test_a_judge_of_another_vocabulary_is_refused(write_run, posts, mesh, tmp_path):
    folder = write_run(tmp_path / "other", "pairwise", digest="f" * 64)
    with pytest.raises(UserError, match="was trained with ffffffffffff: prepare the dataset with the checkpoint's"):
        open_judge(JudgeConfig(folder), posts, mesh)
