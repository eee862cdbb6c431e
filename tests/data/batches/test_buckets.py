import itertools

import numpy as np
import pytest

from alignment_gap.data.batches import choose_buckets
from alignment_gap.data.batches.buckets import bucket_of
from alignment_gap.data.records import lengths_of, open_dataset, write_dataset
from alignment_gap.errors import UserError


def padded_tokens(lengths, shapes):
    """Counted example by example."""
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
    """Against every chain of shapes, in steps of 2 tokens."""
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
    with pytest.raises(UserError, match="buckets=0"):
        choose_buckets(lengths, 0, (8, 4))


def test_the_smallest_bucket_that_fits(lengths):
    shapes = ((4, 2), (4, 7), (12, 7))
    for (prompt, *responses), found in zip(lengths.tolist(), bucket_of(lengths, shapes), strict=True):
        assert found == next(i for i, (p, r) in enumerate(shapes) if prompt <= p and max(responses) <= r)


def test_lengths_are_read_once_and_kept_beside_the_records(tmp_path, make_examples, monkeypatch):
    examples = make_examples(30, responses=3)
    expected = [[len(e.prompt), *map(len, e.responses)] for e in examples]
    assert lengths_of(examples).tolist() == expected
    write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
    dataset = open_dataset(tmp_path)
    assert lengths_of(dataset).tolist() == expected
    (kept,) = tmp_path.glob("lengths-*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(type(dataset), "records", None)
        assert lengths_of(dataset).tolist() == expected
    kept.write_bytes(kept.read_bytes()[:50])
    assert lengths_of(dataset).tolist() == expected
    assert np.load(kept).tolist() == expected


def test_lengths_of_a_changed_dataset_are_read_anew(tmp_path, make_examples):
    for seed in (0, 1):
        examples = make_examples(30, seed=seed)
        write_dataset(tmp_path, examples, vocabulary_digest="", provenance={})
        assert lengths_of(open_dataset(tmp_path)).tolist() == lengths_of(examples).tolist()
