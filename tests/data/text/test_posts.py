import itertools
import math

import numpy as np
import pytest

from alignment_gap.data.text import posts
from alignment_gap.data.text.posts import PostsSettings
from alignment_gap.errors import UserError

POST = "the tea tasted sour . in june my sister was at the park and lost the keys . i felt tired . summary:"
ids = posts.vocabulary().encode


def score(response: str, **settings) -> float:
    return posts.rubric(ids(POST), ids(response), PostsSettings(**settings))


@pytest.mark.parametrize(
    "response, expected",
    [
        # In 7 words, all of the 0.9 for coverage and of the 0.1 for order.
        ("sister lost keys at park in june", 1.0),
        # The same in 10 words: 3 words too many cost 0.04 each.
        ("my sister lost the keys at the park in june", 0.88),
        # Who, action and thing are 0.25, 0.2 and 0.25 of 1. Two of the four pairs of neighbours are in order.
        ("sister lost keys", 0.9 * 0.7 + 0.1 * 2 / 4),
        # All facts, backwards: nothing for the order.
        ("june park keys lost sister", 0.9),
        # A wrong thing: its 0.25 is missing, and it is one invention. sister-lost, lost-park and park-june are in
        # order.
        ("sister lost camera park june", 0.9 * 0.75 + 0.1 * 3 / 4 - 0.25),
        # A fact that comes twice costs 0.15.
        ("sister lost keys keys park june", 0.85),
        # A repeated filler word costs 0.15.
        ("sister lost the the keys park june", 0.85),
        # A side remark of the post costs only by its length: 9 words.
        ("sister lost keys park june the tea tasted sour", 1 - 2 * 0.04),
        # A side remark that the post does not have is two inventions: soup, bland.
        ("sister lost keys park june soup bland", 0.5),
        ("", 0.0),
        ("in the at my", 0.0),
        ("the the the the the the", 0.0),
        ("brother found phone at beach in june", 0.0),
    ],
)
def test_rubric_agrees_with_values_worked_out_by_hand(response, expected):
    assert score(response) == pytest.approx(expected)


def test_rubric_ignores_what_follows_the_end():
    end = posts.vocabulary().eos_id
    short = ids("sister lost keys")
    assert posts.rubric(ids(POST), [*short, end, 0, 0, *ids("cake cake")]) == posts.rubric(ids(POST), short)
    assert posts.rubric(np.array(ids(POST)), np.array([*short, end, 0])) == posts.rubric(ids(POST), short)


def test_rubric_counts_padding_before_the_end_as_a_word_and_what_is_no_word_as_an_invention():
    words = ids("sister lost keys at park in june")
    # One word too many costs 0.04; an invention costs 0.25 more.
    assert posts.rubric(ids(POST), [*words, 0]) == pytest.approx(0.96)
    for no_word in (posts.vocabulary().size - 1, posts.vocabulary().size + 5):
        assert posts.rubric(ids(POST), [*words, no_word]) == pytest.approx(0.71)


def test_rubric_of_a_prompt_without_facts_is_zero():
    assert posts.rubric(ids("i felt tired . summary:"), ids("sister lost keys")) == 0.0


def test_weights_decide_the_score():
    assert score("sister", order_weight=0.0, fact_weights=(4.0, 1, 1, 1, 1)) == pytest.approx(0.5)
    assert score("sister keys sister", repetition_cost=0.0) == pytest.approx(score("sister keys"))


def test_posts_are_a_pure_function_of_seed_and_number():
    assert posts.pair(3, 17) == posts.pair(3, 17)
    assert posts.pair(3, 17) != posts.pair(4, 17)
    assert len({posts.prompt(0, i).words for i in range(1000)}) > 990


def test_facts_are_drawn_uniformly_and_independently():
    facts = [posts.prompt(0, number).facts for number in range(4000)]
    numbers = np.array([[words.index(fact) for words, fact in zip(posts.FACT_WORDS, f, strict=True)] for f in facts])
    for kind in range(5):
        # Chi-squared with 7 and 63 degrees of freedom, p about 1e-4 each.
        assert ((np.bincount(numbers[:, kind], minlength=8) - 500) ** 2 / 500).sum() < 30
        both = np.bincount(8 * numbers[:, kind] + numbers[:, (kind + 1) % 5], minlength=64)
        assert ((both - 62.5) ** 2 / 62.5).sum() < 115


def test_a_world_keeps_its_stream():
    """A change to the stream of a seed makes old results incomparable. Change it only on purpose."""
    pair = posts.pair(0, 1)
    assert " ".join(pair.post.words) == (
        "the rain was grey . in march my father was at the library and broke the guitar . summary:"
    )
    assert " ".join(pair.responses[0]) == "father broke guitar at library in march"


def test_posts_have_the_documented_lengths_and_hold_their_facts():
    for number in range(500):
        post = posts.prompt(1, number)
        assert 16 <= len(post.tokens) <= posts.longest_prompt()
        assert post.words[-1] == "summary:"
        for kind, fact in enumerate(post.facts):
            assert post.words.count(fact) == 1
            assert set(post.words) & set(posts.FACT_WORDS[kind]) == {fact}
    assert posts.longest_prompt() <= 48


def test_a_summary_by_the_books_is_perfect_for_every_post():
    for number in range(200):
        post = posts.prompt(2, number)
        who, action, thing, place, time = post.facts
        assert posts.rubric(post.tokens, ids(f"{who} {action} {thing} at {place} in {time}")) == 1.0


def test_pairs_are_of_mixed_quality_without_ties():
    pairs = [posts.pair(0, number) for number in range(2000)]
    scores = np.array([pair.rubric for pair in pairs])
    assert np.abs(scores[:, 0] - scores[:, 1]).min() > posts.DEFAULT_SETTINGS.minimum_gap
    assert 0.4 < scores.mean() < 0.6 and scores.std() > 0.25
    assert (scores > 0.9).mean() > 0.04 and (scores < 0.1).mean() > 0.04
    assert max(len(words) for pair in pairs for words in pair.responses) <= posts.DEFAULT_SETTINGS.response_words
    for pair in pairs[:200]:
        assert [posts.rubric(pair.post.tokens, ids(" ".join(words))) for words in pair.responses] == list(pair.rubric)


def test_the_rater_agrees_with_the_rubric_as_its_temperature_says():
    pairs = [posts.pair(0, number) for number in range(2000)]
    gaps = np.array([abs(pair.rubric[0] - pair.rubric[1]) for pair in pairs])
    expected = (1 / (1 + np.exp(-gaps / posts.DEFAULT_SETTINGS.rater_temperature))).mean()
    agreement = np.mean([pair.preferred == np.argmax(pair.rubric) for pair in pairs])
    assert 0.85 < expected < 0.92
    assert agreement == pytest.approx(expected, abs=0.02)
    assert np.mean([pair.preferred for pair in pairs]) == pytest.approx(0.5, abs=0.04)


def test_a_biased_rater_prefers_longer_responses_than_the_rubric_does():
    settings = PostsSettings(rater_word_bias=0.1, rater_temperature=1e-3)
    pairs = [posts.pair(0, number, settings) for number in range(500)]
    felt = [np.add(pair.rubric, [0.1 * len(words) for words in pair.responses]) for pair in pairs]
    assert [pair.preferred for pair in pairs if abs(np.diff(felt[pair.post.prompt_id])[0]) > 0.02] == [
        np.argmax(both) for both in felt if abs(np.diff(both)[0]) > 0.02
    ]
    assert 0.6 < np.mean([pair.preferred == np.argmax(pair.rubric) for pair in pairs]) < 0.9
    fair = [posts.pair(0, number) for number in range(500)]
    assert [pair.responses for pair in pairs] == [pair.responses for pair in fair]


def test_degenerate_responses_score_far_below_the_writer():
    mean = np.mean([posts.pair(0, number).rubric for number in range(300)])
    for response in ("", "sister " * 11, "the " * 11, "my the at the in", "sister lost keys at park in june"):
        scores = [posts.rubric(posts.prompt(0, number).tokens, ids(response)) for number in range(300)]
        assert np.mean(scores) < mean / 4


@pytest.mark.slow
def test_oracle_features_decide_the_pairs_linearly():
    """A linear classifier on noisy labels recovers the noiseless preference.

    So the features of the rubric can be learned.
    """

    def features(pair, k):
        words, facts = pair.responses[k], pair.post.facts
        told = [facts.index(word) for word in dict.fromkeys(words) if word in facts]
        invented = {w for kind in posts.FACT_WORDS for w in kind} - set(facts)
        rising = sum(a < b for a, b in itertools.pairwise(told))
        return [*(float(i in told) for i in range(5)), rising, len(words), len(words) - len(set(words)),
                len(set(words) & invented)]  # fmt: skip

    pairs = [posts.pair(5, number) for number in range(4000)]
    x = np.array([np.subtract(features(pair, 0), features(pair, 1)) for pair in pairs])
    y = np.array([pair.preferred == 0 for pair in pairs], float)
    truth = np.array([pair.rubric[0] > pair.rubric[1] for pair in pairs])
    x, weights = x / x.std(0), np.zeros(x.shape[1])
    for _ in range(300):
        weights += 0.5 * x[:3000].T @ (y[:3000] - 1 / (1 + np.exp(-x[:3000] @ weights))) / 3000
    assert np.mean((x[3000:] @ weights > 0) == truth[3000:]) > 0.92


@pytest.mark.parametrize(
    "change, message",
    [
        ({"miss_chance": 1.5}, "miss_chance is 1.5: it must be from 0 to 1"),
        ({"word_cost": -1.0}, "word_cost is -1.0: it must be from 0 to 1"),
        ({"order_weight": 2.0}, "order_weight is 2.0"),
        ({"best_writer_faults": -0.1}, "best_writer_faults is -0.1"),
        ({"side_remarks_low": -1}, "side_remarks_low is -1: it must be at least 0"),
        ({"side_remarks_low": 4}, "side_remarks_high is 3: it must be at least 4"),
        ({"brief_words": -1}, "brief_words is -1"),
        ({"rater_temperature": 0.0}, "rater_temperature is 0.0: it must be above 0 and finite"),
        ({"rater_word_bias": math.nan}, "rater_word_bias is nan: it must be from -1 to 1"),
        ({"response_words": 0}, "response_words is 0: it must be at least 1"),
        ({"fact_weights": (1.0,)}, r"fact_weights is \(1.0,\): give 5 numbers above 0"),
        ({"fact_weights": (1.0, 1, 1, 1, 0)}, "fact_weights is .*: give 5 numbers above 0"),
    ],
)
def test_settings_out_of_range_are_named(change, message):
    with pytest.raises(UserError, match=message):
        PostsSettings(**change)


def test_a_gap_that_no_pair_has_is_refused():
    with pytest.raises(UserError, match=r"minimum_gap is 1\.0, but none of 1000 pairs of post 0 has it: lower it"):
        posts.pair(0, 0, PostsSettings(minimum_gap=1.0))
