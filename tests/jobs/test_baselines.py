"""Baselines of preference models: pairs whose labels they predict, and what they refuse."""

import numpy as np
import pytest
from built_in import write_posts

from alignment_gap.data.records import Example, write_dataset
from alignment_gap.errors import UserError
from alignment_gap.jobs.baselines import BASELINES, BaselinesConfig, _differences, _fitted, load_accuracies, tell
from alignment_gap.jobs.folder import make


def pair(chosen, rejected, *, swapped):
    """An example whose first response is preferred; with `swapped`, the second one."""
    responses = [np.array(each, np.int32) for each in (chosen, rejected)]
    scores = np.array([1.0, 0.0], np.float32)
    order = [1, 0] if swapped else [0, 1]
    return Example(0, np.array([5], np.int32), tuple(responses[i] for i in order), scores[order])


def random_pairs(count, seed, mark):
    """Pairs of random responses. The preferred one ends with the mark."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        chosen, rejected = (rng.integers(10, 40, size=rng.integers(2, 9)).tolist() for _ in range(2))
        yield pair([*chosen, *mark], rejected, swapped=rng.random() < 0.5)


def test_the_shorter_response_by_hand():
    train, held_out = (
        list(random_pairs(20, 0, [])),
        [
            pair([7, 8], [7, 8, 9], swapped=False),
            pair([7, 8], [7, 8, 9], swapped=True),
            pair([7, 8, 9, 9], [7], swapped=True),
            pair([7, 8], [9, 8], swapped=False),
        ],
    )
    assert tell(train, held_out)["shorter"].tolist() == [1, 1, 0, 0.5]


@pytest.mark.parametrize("mark", [[50], [11, 12]], ids=["unigram", "bigram"])
def test_ngrams_tell_pairs_by_a_word_or_by_two_in_a_row(mark):
    told = tell(list(random_pairs(400, 0, mark)), list(random_pairs(200, 1, mark)))
    assert told["ngrams"].mean() > 0.95
    assert told["shorter"].mean() < 0.5


def test_ngrams_tell_nothing_where_there_is_nothing_to_tell():
    told = tell(list(random_pairs(400, 2, [])), list(random_pairs(400, 3, [])))
    assert 0.4 < told["ngrams"].mean() < 0.6


def test_the_regression_is_that_of_its_formula():
    """One n-gram predicts 3 of 4 pairs. The slope of mean log(1 + exp(-x w)) + penalty w^2 / 2 is 0 at the minimum."""
    train = [pair([7], [8], swapped=False)] * 3 + [pair([8], [7], swapped=True)]
    rows = _differences(train, {(7,): 0})
    assert rows.toarray().tolist() == [[1], [1], [1], [-1]]
    (weight,) = _fitted(rows, 0.01)
    slope = -(3 / (1 + np.exp(weight)) - 1 / (1 + np.exp(-weight))) / 4 + 0.01 * weight
    assert abs(slope) < 1e-4 and 0.9 < weight < np.log(3)


def test_pairs_without_a_preferred_response_are_left_out():
    decided = pair([7], [8, 9], swapped=False)
    tie = Example(0, decided.prompt, decided.responses, np.zeros(2, np.float32))
    assert len(tell([decided] * 10, [tie, decided])["shorter"]) == 1
    with pytest.raises(
        UserError, match="train has 10 pairs with a preferred response and dataset has 0: give at least 10"
    ):
        tell([decided] * 10, [tie])
    with pytest.raises(
        UserError, match="train has 9 pairs with a preferred response and dataset has 1: give at least 10"
    ):
        tell([decided] * 9 + [tie], [decided])


def test_the_job_tells_the_last_held_out_pairs(pairs, tmp_path):
    write_posts(tmp_path / "held_out", 30, seed=1)
    make(BASELINES, BaselinesConfig(str(pairs), str(tmp_path / "held_out"), pairs=20), tmp_path / "told")
    found = load_accuracies(tmp_path / "told")
    assert found.keys() == {"shorter", "ngrams"} and all(
        0 <= each.low <= each.value <= each.high <= 1 for each in found.values()
    )
    text = BASELINES.summary(tmp_path / "told")
    assert "shorter   20" in text and f"results: {tmp_path / 'told' / 'results.csv'}" in text


def test_datasets_that_hold_no_pairs_are_refused(pairs, tmp_path):
    single = [Example(0, np.array([5], np.int32), (np.array([7], np.int32),), np.ones(1, np.float32))]
    write_dataset(tmp_path / "single", single, vocabulary_digest="v", provenance={})
    for settings, setting in (((tmp_path / "single", pairs), "train"), ((pairs, tmp_path / "single"), "dataset")):
        with pytest.raises(UserError, match=f"{setting} has 1 responses per prompt: give a dataset of pairs"):
            make(BASELINES, BaselinesConfig(*map(str, settings)), tmp_path / "told")
    with pytest.raises(UserError, match="train is not set: give the folder of a prepared dataset"):
        make(BASELINES, BaselinesConfig(), tmp_path / "told")
