"""The true quality of responses is known only if all data come from the built-in posts."""

import dataclasses

import numpy as np
import pytest
from built_in import posts_examples, write_posts

from alignment_gap.data.records import derived, open_dataset, write_dataset
from alignment_gap.data.tasks.rubric import rubric_of
from alignment_gap.data.text import load_vocabulary, posts
from alignment_gap.errors import UserError

DIGEST = posts.vocabulary().digest
# These differ from the defaults, so a rubric with default settings would show.
STRICT = posts.PostsSettings(order_weight=0.5, word_cost=0.2)
OLD = {"task": "posts", "config": {"kind": "posts", "pairs": 8, "settings": dataclasses.asdict(STRICT)}}
NEW = {"made_by": "prepare", "source": {"location": "posts", "posts": {"settings": dataclasses.asdict(STRICT)}}}
HUMAN = {"made_by": "prepare", "source": {"location": "pairs.jsonl"}}


@pytest.fixture(scope="module")
def examples():
    return posts_examples(8)


@pytest.fixture
def make(tmp_path, examples):
    """Writes a dataset with this provenance, and opens it."""

    def write(name, provenance, digest=DIGEST):
        write_dataset(tmp_path / name, examples, vocabulary_digest=digest, provenance=provenance)
        return open_dataset(tmp_path / name)

    return write


def scores(rubric, examples, k=0):
    return rubric([e.prompt.tolist() for e in examples], [e.responses[k].tolist() for e in examples])


def test_it_is_the_rubric_of_the_posts(tmp_path, examples):
    write_posts(tmp_path, 8)
    rubric = rubric_of(open_dataset(tmp_path))
    for k in range(2):
        found = scores(rubric, examples, k)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [posts.pair(0, number).rubric[k] for number in range(8)], rtol=1e-6)


def test_it_agrees_with_values_worked_out_by_hand(tmp_path):
    """Six rubric scores of test_posts. Tokens after the end are ignored."""
    write_posts(tmp_path, 1)
    ids, end = posts.vocabulary().encode, posts.vocabulary().eos_id
    post = "the tea tasted sour . in june my sister was at the park and lost the keys . i felt tired . summary:"
    by_hand = {
        "sister lost keys at park in june": 1.0,
        "my sister lost the keys at the park in june": 0.88,
        "june park keys lost sister": 0.9,
        "sister lost keys keys park june": 0.85,
        "sister lost keys park june soup bland": 0.5,
        "in the at my": 0.0,
    }
    found = rubric_of(open_dataset(tmp_path))([ids(post)] * 6, [[*ids(words), end, *ids("cake")] for words in by_hand])
    np.testing.assert_allclose(found, list(by_hand.values()), atol=1e-6)


@pytest.mark.parametrize("provenance", [NEW, OLD])
def test_the_settings_are_those_that_the_provenance_states(make, provenance, examples):
    """Provenance has a newer and an older form. It is found directly, and through two more datasets."""
    source = make("source", provenance)
    labelled = make("labelled", derived("relabel", {"pairs": source}))
    mixed = make("mixed", derived("mix", {"pairs 0": labelled, "pairs 1": source}))
    expected = [posts.rubric(e.prompt, e.responses[0], STRICT) for e in examples]
    for dataset in (source, labelled, mixed):
        np.testing.assert_allclose(scores(rubric_of(dataset), examples), expected, rtol=1e-6)
    assert not np.allclose(expected, [posts.rubric(e.prompt, e.responses[0]) for e in examples])


@pytest.mark.parametrize(
    "provenance",
    [{}, HUMAN, {"task": "human_pairs", "config": {}}, {"task": "posts"}, {"source": "posts"}, {"vocabulary": "posts"}],
)
def test_nobody_knows_the_quality_of_other_data(make, provenance):
    dataset = make("other", provenance)
    assert rubric_of(dataset) is None
    assert rubric_of(make("shuffled", derived("shuffle", {"pairs": dataset}))) is None


def test_a_mixture_has_a_rubric_only_where_its_parts_have_one_and_the_same(make):
    strict, human = make("strict", NEW), make("human", HUMAN)
    lenient = {"settings": dataclasses.asdict(posts.PostsSettings(word_cost=0.0))}
    other = make("other", NEW | {"source": {"location": "posts", "posts": lenient}})
    old = make("old", OLD)
    for first, second, known in (
        (strict, old, True),
        (strict, human, False),
        (human, strict, False),
        (strict, other, False),
    ):
        mixed = make("mixed", derived("mix", {"pairs 0": first, "pairs 1": second}))
        assert (rubric_of(mixed) is not None) == known


def test_tokens_of_another_vocabulary_have_no_rubric(make):
    assert rubric_of(make("bytes", NEW, load_vocabulary("bytes").digest)) is None


def test_settings_that_this_version_does_not_know_are_named(make):
    stated = {"posts": {"settings": {"spelling_cost": 0.1}}, "location": "posts"}
    with pytest.raises(UserError, match=r"unknown key settings of the posts\.spelling_cost"):
        rubric_of(make("newer", {"source": stated}))


def test_it_is_the_quality_of_both_summaries_of_a_post(tmp_path):
    write_posts(tmp_path / "pairs", 300)
    dataset = open_dataset(tmp_path / "pairs")
    rubric, pairs = rubric_of(dataset), list(dataset)
    prompts = [e.prompt for e in pairs]
    first, second = (rubric(prompts, [e.responses[k] for e in pairs]) for k in range(2))
    np.testing.assert_allclose([first, second], np.transpose([posts.pair(0, n).rubric for n in range(300)]), rtol=1e-6)
    assert first.dtype == np.float32
    assert 0.8 < np.mean((first > second) == [e.scores[0] for e in pairs]) < 0.95
