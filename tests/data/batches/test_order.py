"""The order of an epoch is a function of the seed and the epoch's number; each dataset has its share of the places."""

import collections
import itertools
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from alignment_gap.data.batches.order import Order, Stream, draws_of, kept, permutation, random_keys
from alignment_gap.errors import UserError


def test_the_shares_of_the_places_by_hand():
    assert draws_of((5, 3), None) == (5, 3)
    # Two halves of 10 places. Weights 1 to 2 give 2.33 and 4.67 of 7 places.
    assert draws_of((9, 1), (1, 1)) == (5, 5)
    assert draws_of((4, 3), (1, 2)) == (2, 5)
    # A third of 10 places is 3.33. Of equal remainders the first is rounded up.
    assert draws_of((5, 4, 1), (1, 1, 1)) == (4, 3, 3)
    assert draws_of((4, 3), (0.1, 0.2)) == draws_of((4, 3), (10, 20))


@pytest.mark.parametrize(
    "weights, message",
    [
        ((), r"weights is \(\), but there are 2 datasets: give one weight for each"),
        ((1.0,), r"weights is \(1.0,\), but there are 2 datasets: give one weight for each"),
        ((1.0, -1.0), r"weights is \(1.0, -1.0\): each must be above 0 and finite; or leave its dataset out"),
        ((1.0, float("nan")), "each must be above 0 and finite"),
        ((1.0, float("inf")), "each must be above 0 and finite"),
        ((1000.0, 1.0), "weight 1.0 gives dataset 1 none of the 8 examples of an epoch: raise it"),
    ],
)
def test_weights_that_give_no_mixture_are_named(weights, message):
    with pytest.raises(UserError, match=message):
        draws_of((5, 3), weights)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "windows"}, r"kind is 'windows': did you mean window\?"),
        ({"seed": -1}, "seed is -1: it must be from 0 to 4294967295"),
        ({"kind": "window", "window": 0}, "window is 0: it must be at least 1"),
        ({"kind": "window"}, "window is None with the order 'window': set it for the order 'window', and only"),
        ({"window": 3}, "window is 3 with the order 'shuffle': set it for the order 'window', and only"),
    ],
)
def test_an_order_checks_itself(change, message):
    with pytest.raises(UserError, match=message):
        Order(**{"sizes": (5,), "draws": (5,), "seed": 0} | change)


def test_recorded_is_the_same_in_every_epoch():
    order = Order((3, 2), (3, 2), 7, "recorded")
    assert order.epoch(0).tolist() == order.epoch(5).tolist() == [0, 1, 2, 3, 4]
    assert order.epoch(0).dtype == np.int32 and len(order) == 5


@pytest.mark.parametrize("kind, window", [("shuffle", None), ("window", 4)])
def test_an_epoch_follows_from_seed_and_number_and_has_every_example_once(kind, window):
    order, again = (Order((10,), (10,), 7, kind, window) for _ in range(2))
    epochs = [order.epoch(number).tolist() for number in range(5)]
    assert [again.epoch(number).tolist() for number in reversed(range(5))] == epochs[::-1]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert Order((10,), (10,), 8, kind, window).epoch(0).tolist() != epochs[0]


def test_a_window_s_examples_stay_in_it_and_the_last_may_be_short():
    epoch = Order((10,), (10,), 3, "window", 4).epoch(2).tolist()
    assert [sorted(epoch[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_weighted_dataset_goes_through_all_of_its_examples_before_one_comes_again():
    """Datasets of 5 and 3 examples have 2 and 6 places: a round takes 2.5 epochs, or half an epoch."""
    order = Order((5, 3), (2, 6), 1)
    epochs = [order.epoch(number).tolist() for number in range(5)]
    for epoch in epochs:
        assert len(epoch) == 8 and sum(number < 5 for number in epoch) == 2
        assert collections.Counter(number for number in epoch if number >= 5) == {5: 2, 6: 2, 7: 2}
    first = [number for epoch in epochs for number in epoch if number < 5]
    assert set(collections.Counter(first).values()) == {2}
    # The first round takes two epochs and half of the third. Places within an epoch are shuffled.
    assert len({*first[:4]}) == 4


def test_a_stream_is_the_epochs_one_after_another_read_anywhere():
    order = Order((7,), (7,), 2)
    whole = np.concatenate([order.epoch(number) for number in range(5)])
    stream = Stream(order)
    for start, count in ((0, 7), (5, 4), (6, 20), (13, 1), (34, 1), (3, 0)):
        found = stream(start, count)
        assert found.tolist() == whole[start : start + count].tolist() and found.dtype == np.int32


def test_permutations_are_those_of_the_documented_generator():
    """They follow PCG64's raw output. NumPy promises that it does not change between versions."""
    keys = np.random.PCG64((4, 2)).random_raw(6)
    assert random_keys(6, 4, 2).tolist() == keys.tolist()
    assert permutation(6, 4, 2).tolist() == sorted(range(6), key=lambda i: keys[i])


def test_what_is_kept_is_computed_once_whatever_the_number_of_threads():
    made, barrier = [], threading.Barrier(4)
    cached = kept(lambda number: made.append(number) or -number, size=2)

    def ask():
        barrier.wait()
        assert cached(3) == -3

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [3]
    for number in (4, 5, 3):  # The cache keeps two values; the third pushes the first out.
        cached(number)
    assert made == [3, 4, 5, 3]


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    datasets=strategies.lists(
        strategies.tuples(strategies.integers(5, 40), strategies.integers(1, 4)), min_size=1, max_size=4
    )
)
def test_places_are_the_nearest_whole_numbers_to_the_weights(datasets):
    """By largest remainders. No other whole numbers with this sum are nearer to the exact shares."""
    sizes, weights = zip(*datasets, strict=True)
    exact = np.array(weights) / sum(weights) * sum(sizes)
    draws = draws_of(sizes, weights)
    assert sum(draws) == sum(sizes) and np.abs(draws - exact).max() < 1
    around = itertools.product(*[(int(share), int(share) + 1) for share in exact])
    least = min(np.abs(np.array(other) - exact).sum() for other in around if sum(other) == sum(sizes))
    assert np.abs(draws - exact).sum() == pytest.approx(least)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    datasets=strategies.lists(
        strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 9)), min_size=1, max_size=3
    ),
    seed=strategies.integers(0, 2**32 - 1),
)
def test_at_every_end_of_an_epoch_examples_of_a_dataset_have_come_as_often_as_each_other_or_once_more(datasets, seed):
    sizes, draws = zip(*datasets, strict=True)
    order, seen = Order(sizes, draws, seed), collections.Counter()
    starts = np.cumsum((0, *sizes))
    for number in range(4):
        epoch = order.epoch(number).tolist()
        assert len(epoch) == len(order) == sum(draws)
        seen.update(epoch)
        if draws == sizes:
            assert sorted(epoch) == list(range(sum(sizes)))
        for first, stop, count in zip(starts, starts[1:], draws, strict=False):
            times = [seen[example] for example in range(first, stop)]
            assert sum(times) == (number + 1) * count and max(times) - min(times) <= 1
