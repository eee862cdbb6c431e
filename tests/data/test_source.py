import collections
import time

import numpy as np
import pytest

from alignment_gap.data import offline_source, open_dataset, write_dataset
from alignment_gap.errors import UserError

LENGTHS = {"prompt_length": 9, "response_length": 5}


def ids(source, steps) -> list[int]:
    return [int(i) - 1000 for step in steps for i in source(step).prompt_ids]


@pytest.fixture
def dataset(tmp_path, make_examples):
    write_dataset(tmp_path, make_examples(50), vocabulary_digest="", provenance={})
    return open_dataset(tmp_path)


def test_recorded_order_is_the_records_in_order_then_again(dataset):
    source = offline_source(dataset, batch_size=8, seed=3, order="recorded", **LENGTHS)
    for step in range(14):
        assert ids(source, [step]) == [i % 50 for i in range(step * 8, step * 8 + 8)]


def test_shuffle_gives_every_example_once_an_epoch_each_epoch_anew(dataset):
    source = offline_source(dataset, batch_size=10, seed=3, **LENGTHS)
    epochs = [ids(source, range(5 * epoch, 5 * epoch + 5)) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert epochs[0] != epochs[1] != epochs[2] != list(range(50))


def test_batches_reach_over_the_end_of_an_epoch_without_loss(dataset):
    source = offline_source(dataset, batch_size=8, seed=3, **LENGTHS)
    seen = collections.Counter(ids(source, range(25)))
    assert set(seen) == set(range(50)) and set(seen.values()) == {4}


@pytest.mark.parametrize("order, window", [("shuffle", 0), ("recorded", 0), ("window", 2)])
def test_a_batch_is_a_function_of_seed_and_step(dataset, plain, order, window):
    settings = dict(batch_size=8, seed=3, order=order, window=window, **LENGTHS)
    whole = [vars(offline_source(dataset, **settings)(step)) for step in range(20)]
    for step in (19, 7, 0):
        resumed = vars(offline_source(list(dataset), **settings)(step))
        for field, value in whole[step].items():
            np.testing.assert_array_equal(value, resumed[field])


def test_seeds_give_other_orders(dataset):
    orders = [ids(offline_source(dataset, batch_size=10, seed=s, **LENGTHS), range(5)) for s in range(5)]
    assert len({tuple(order) for order in orders}) == 5


def test_shuffle_is_near_uniform(make_examples):
    """Each of 8 examples is first about as often as any other, over seeds."""
    examples = make_examples(8)
    first = [ids(offline_source(examples, batch_size=1, seed=seed, **LENGTHS), [0])[0] for seed in range(800)]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 30  # chi-squared with 7 degrees of freedom, p about 1e-4


def test_window_shuffles_within_windows_only(dataset):
    source = offline_source(dataset, batch_size=4, seed=3, order="window", window=3, **LENGTHS)
    order = ids(source, range(12)) + ids(source, [12])[:2]
    for start in range(0, 50, 12):
        assert sorted(order[start : start + 12]) == list(range(start, min(start + 12, 50)))
    assert order[:12] != list(range(12))
    within = [tuple(i - start for i in order[start : start + 12]) for start in range(0, 48, 12)]
    assert len(set(within)) == 4


def test_window_is_uniform_within_a_window(make_examples):
    examples = make_examples(16)
    first = [
        ids(offline_source(examples, batch_size=4, seed=seed, order="window", window=2, **LENGTHS), [2])[0] - 8
        for seed in range(800)
    ]
    counts = np.bincount(first, minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 30


@pytest.mark.parametrize(
    "change, message",
    [
        ({"order": "random"}, "order='random' is unknown: choose one of shuffle, recorded, window"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"window": 4}, "window=4 does not go with order='shuffle'"),
        ({"order": "window"}, "window=0 does not go with order='window'"),
        ({"prompt_length": 8}, "over prompt_length=8"),
    ],
)
def test_settings_out_of_range_are_named(dataset, change, message):
    with pytest.raises(UserError, match=message):
        source = offline_source(dataset, **({"batch_size": 50, "seed": 0} | LENGTHS | change))
        source(0)


def test_no_example_or_step_is_refused(dataset):
    with pytest.raises(UserError, match="empty"):
        offline_source([], batch_size=4, seed=0, **LENGTHS)
    with pytest.raises(UserError, match="step=-1"):
        offline_source(dataset, batch_size=4, seed=0, **LENGTHS)(-1)


def test_a_batch_of_64_takes_milliseconds(tmp_path, make_examples):
    """2 ms on an idle core; the bound leaves room for a busy machine."""
    write_dataset(tmp_path, make_examples(5000), vocabulary_digest="", provenance={})
    source = offline_source(open_dataset(tmp_path), batch_size=64, seed=0, **LENGTHS)
    source(0)
    start = time.process_time()
    for step in range(50):
        source(step)
    assert (time.process_time() - start) / 50 < 0.01
