"""The bootstrap of a mean against the normal interval, its coverage, and the arrays that break a bootstrap."""

import math

import numpy as np
import pytest

from alignment_gap.evaluation.intervals import Interval, mean_interval


def test_matches_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2048)
    interval = mean_interval(values, resamples=4000)
    half_width = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


def test_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = mean_interval(rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.1, 0.6], size=200), resamples=400, seed=trial)
        covered += interval.low <= 0.65 <= interval.high
    assert 180 <= covered <= 199


def test_one_seed_gives_one_interval():
    values = np.arange(50.0)
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_equal_examples_have_no_width():
    assert mean_interval(np.ones(64)) == Interval(1.0, 1.0, 1.0)


def test_one_example_has_no_interval_and_none_has_no_mean():
    assert math.isnan(mean_interval(np.array([2.0])).low)
    assert mean_interval(np.array([2.0])).value == 2.0
    assert math.isnan(mean_interval(np.array([])).value)


def test_refuses_a_table():
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        mean_interval(np.zeros((2, 3)))


def test_negation_swaps_the_ends():
    assert -Interval(1.0, 0.5, 2.0) == Interval(-1.0, -2.0, -0.5)


