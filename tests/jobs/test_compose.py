"""Datasets made from datasets: shuffled, mixed by weight, limited, and with every prompt once."""

import collections
import dataclasses

import pytest
from job_runs import Bar
from random_examples import make_random_examples, plain

from alignment_gap.data.records import open_dataset, write_dataset
from alignment_gap.errors import UserError
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig, distinct_prompts
from alignment_gap.jobs.folder import make


def write(folder, examples, digest="v", **facts):
    write_dataset(folder, examples, vocabulary_digest=digest, provenance={"task": "pairs"}, **facts)
    return str(folder)


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "pairs", make_random_examples(40))


def compose(folder, *datasets, **settings):
    make(COMPOSE, ComposeConfig(datasets, **settings), folder, Bar())
    return open_dataset(folder)


def test_shuffled_it_is_the_same_examples_in_another_order(pairs, tmp_path):
    found, wanted = ([plain(e) for e in some] for some in (compose(tmp_path / "a", pairs, seed=1), open_dataset(pairs)))
    assert found != wanted and sorted(found) == sorted(wanted)
    compose(tmp_path / "b", pairs, seed=1)
    assert (tmp_path / "a" / "card.json").read_bytes() == (tmp_path / "b" / "card.json").read_bytes()
    assert [plain(e) for e in compose(tmp_path / "c", pairs, seed=2)] != found


def test_a_window_s_examples_stay_in_it(pairs, tmp_path):
    windows = compose(tmp_path / "a", pairs, order="window", window=8)
    found, wanted = ([plain(e) for e in some] for some in (windows, open_dataset(pairs)))
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        assert found[part] != wanted[part] and sorted(found[part]) == sorted(wanted[part])


def test_the_first_examples_in_the_recorded_order(pairs, tmp_path):
    found = compose(tmp_path / "a", pairs, order="recorded", limit=7)
    assert [plain(e) for e in found] == [plain(e) for e in open_dataset(pairs)[:7]]


def test_a_mixture_has_the_weights_and_is_mixed(pairs, tmp_path):
    others = [dataclasses.replace(e, prompt_id=5000 + i) for i, e in enumerate(make_random_examples(20, seed=3))]
    other = write(tmp_path / "others", others)
    whole = compose(tmp_path / "all", pairs, other, seed=2)
    ids = [e.prompt_id for e in whole]
    assert sorted(ids) == sorted([*(e.prompt_id for e in open_dataset(pairs)), *(e.prompt_id for e in others)])
    # The two datasets are mixed: the last 20 examples are not all from the second one.
    assert 0 < sum(each >= 5000 for each in ids[-20:]) < 20
    digests = [open_dataset(each).card.digest for each in (pairs, other)]
    assert [part["digest"] for part in whole.card.provenance["inputs"]] == digests
    half = compose(tmp_path / "half", pairs, other, weights=(1, 1))
    counts = collections.Counter(e.prompt_id for e in half)
    of_other = {id_: count for id_, count in counts.items() if id_ >= 5000}
    assert sum(counts.values()) == 60 and sum(of_other.values()) == 30
    assert len(of_other) == 20 and set(of_other.values()) <= {1, 2}
    assert max(count for id_, count in counts.items() if id_ < 5000) == 1


def test_rewards_stay_rewards_and_are_not_mixed_with_probabilities(pairs, tmp_path):
    rewards = write(tmp_path / "r", make_random_examples(4), scores="rewards")
    assert compose(tmp_path / "shuffled", rewards).card.scores == "rewards"
    assert compose(tmp_path / "mixed", rewards, rewards).card.scores == "rewards"
    assert compose(tmp_path / "plain", pairs).card.scores == "probabilities"
    with pytest.raises(UserError, match=r"has scores that are probabilities, .* has rewards: use datasets"):
        compose(tmp_path / "both", rewards, pairs)


BAD = {
    "none": ((), {}, "datasets is not set"),
    "missing": (("nowhere",), {}, "nowhere is not a finished dataset"),
    "window": (("PAIRS",), {"order": "window", "window": 0}, "window is 0: it must be at least 1"),
    "weights": (("PAIRS",), {"weights": (1.0, 2.0)}, "but there are 1 datasets"),
    "a weight": (("PAIRS", "PAIRS"), {"weights": (1.0, 0.0)}, "each must be above 0"),
    "weights in order": (("PAIRS",), {"weights": (1.0,), "order": "recorded"}, "leave weights out, or shuffle"),
    "order": (("PAIRS",), {"order": "sorted"}, "order is 'sorted': choose one of"),
    "limit": (("PAIRS",), {"limit": 0}, "limit is 0"),
    "seed": (("PAIRS",), {"seed": -1}, "seed is -1"),
    "vocabularies": (("PAIRS", "OTHER"), {}, r"OTHER has a vocabulary of digest w, .*pairs has v"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_composed_is_one_line(name, pairs, tmp_path, monkeypatch):
    datasets, settings, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "OTHER", make_random_examples(5), digest="w")
    with pytest.raises(UserError, match=message) as error:
        compose(tmp_path / "out", *(pairs if each == "PAIRS" else each for each in datasets), **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_every_prompt_once(tmp_path):
    examples = make_random_examples(6)
    write(tmp_path / "a", [*examples, *examples[:3], examples[0]])
    distinct = len({e.prompt.tobytes() for e in examples})
    assert distinct_prompts(open_dataset(tmp_path / "a")).tolist() == list(range(distinct))
    assert distinct_prompts(open_dataset(tmp_path / "a"), 2).tolist() == [0, 1]
