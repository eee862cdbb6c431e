"""The shapes that batches are padded to: how they are chosen, which fit, and how an epoch is cut into batches."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from alignment_gap.data.batches import choose_buckets
from alignment_gap.data.batches.buckets import bucket_of, check_buckets, cut_within_buckets
from alignment_gap.errors import UserError


def padded_tokens(lengths, shapes):
    """Counts the padded tokens example by example."""
    total = 0
    for prompt, *responses in lengths.tolist():
        p, r = next((p, r) for p, r in shapes if prompt <= p and max(responses) <= r)
        total += p + r * len(responses)
    return total


@pytest.fixture(scope="module")
def lengths():
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(1, 13, 60), rng.geometric(0.3, 60).clip(1, 7), rng.integers(1, 8, 60)], axis=1)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_chosen_buckets_pad_least_of_all_chains(lengths, count):
    """Compares with every chain of shapes, in steps of 2 tokens."""
    found = choose_buckets(lengths, count, (12, 7), multiple=2)
    limits = list(itertools.product((2, 4, 6, 8, 10, 12), (2, 4, 6, 7)))
    chains = [
        (*chain, (12, 7))
        for chain in itertools.combinations(limits, count - 1)
        if all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(chain)) and (12, 7) not in chain
    ]
    assert len(found) == count and found[-1] == (12, 7)
    assert padded_tokens(lengths, found) == min(padded_tokens(lengths, chain) for chain in chains)


def test_more_buckets_than_there_are_lengths_are_not_made():
    lengths = np.array([[8, 4, 4]] * 9)
    assert choose_buckets(lengths, 5, (8, 4), multiple=4) == ((8, 4),)
    with pytest.raises(UserError, match="buckets is 0: it must be at least 1"):
        choose_buckets(lengths, 0, (8, 4))


def test_the_smallest_bucket_that_fits(lengths):
    shapes = ((4, 2), (4, 7), (12, 7))
    for (prompt, *responses), found in zip(lengths.tolist(), bucket_of(lengths, shapes), strict=True):
        assert found == next(i for i, (p, r) in enumerate(shapes) if prompt <= p and max(responses) <= r)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        ([(4, 4), (5, 3)], r"^bucket \(5, 3\) does not hold bucket \(4, 4\): give shapes \(P, R\) that grow in both$"),
        ([(4, 4), (4, 4)], r"bucket \(4, 4\) does not hold bucket \(4, 4\)"),
        ([(4, 4), (6, 6), (5, 7)], r"bucket \(5, 7\) does not hold bucket \(6, 6\)"),
        ([(3, 0), (5, 3)], r"buckets is \(\(3, 0\), \(5, 3\)\): give at least one shape \(P, R\), with P and R of 1"),
        ([], r"buckets is \(\): give at least one shape"),
    ],
)
def test_buckets_that_are_not_nested_are_named(buckets, message):
    with pytest.raises(UserError, match=message):
        check_buckets(buckets)
    check_buckets([(1, 1), (1, 2), (3, 2)])


def test_the_first_example_that_fits_nowhere_is_named():
    lengths = np.array([[4, 2, 1], [5, 1, 1], [9, 1, 1], [4, 1, 8]])
    with pytest.raises(UserError, match=r"^example 1 has a prompt of 5 tokens, over prompt_length=4: raise"):
        bucket_of(lengths, [(2, 2), (4, 7)])
    with pytest.raises(UserError, match=r"^example 3 has a response of 8 tokens, over response_length=7: raise"):
        bucket_of(lengths, [(2, 2), (9, 7)])


def test_an_epoch_is_cut_into_batches_of_one_bucket_by_hand():
    """One example of bucket 0 is left over; it completes the first batch of bucket 1.

    One of bucket 2 is left at the end.
    """
    fitting = np.array([0, 1, 0, 2, 1, 0, 1, 2, 2], np.uint8)
    numbers = np.array([20, 21, 22, 23, 24, 25, 26, 27, 28])
    groups, rest = cut_within_buckets(numbers, fitting, 2)
    assert [group.tolist() for group in groups] == [[[20, 22]], [[25, 21], [24, 26]], [[23, 27]]]
    assert rest.tolist() == [28]
    groups, rest = cut_within_buckets(numbers[:0], fitting[:0], 2)
    assert [group.tolist() for group in groups] == [[]] and rest.size == 0


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(fitting=strategies.lists(strategies.integers(0, 3), max_size=30), size=strategies.integers(1, 6))
def test_every_example_is_in_one_batch_and_moves_up_only_where_its_bucket_cannot_fill_one(fitting, size):
    fitting = np.array(fitting, np.uint8)
    numbers = np.random.default_rng(0).permutation(len(fitting))
    own = fitting[numbers]
    groups, rest = cut_within_buckets(numbers, own, size)
    cut = [batch for group in groups for batch in group.tolist()]
    assert sorted([number for batch in cut for number in batch] + rest.tolist()) == list(range(len(fitting)))
    assert len(rest) < size and all(len(batch) == size for batch in cut)
    for bucket, group in enumerate(groups):
        assert (fitting[group] <= bucket).all()
        # At most one batch of a bucket has examples of smaller buckets.
        assert sum((fitting[batch] < bucket).any() for batch in group) <= 1
    for bucket in range(len(groups)):
        moved = sum(int((fitting[group] == bucket).sum()) for group in groups[bucket + 1 :])
        assert moved + int((fitting[rest] == bucket).sum()) < size
