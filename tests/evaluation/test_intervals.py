"""The bootstrap of a mean against the normal interval, its coverage, and the arrays that break a bootstrap."""

import math

import numpy as np
import pytest

from alignment_gap.evaluation.intervals import Interval, mean_interval, over_groups, resampled_means


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


def test_within_cuts_the_ends():
    assert Interval(0.9, 0.8, 1.1).within(0.0, 1.0) == Interval(0.9, 0.8, 1.0)


def test_joint_resamples_leave_a_constant_difference_exact():
    first = np.random.default_rng(0).random(40)
    means = resampled_means(np.stack([first, first + 0.25]), seed=0, resamples=50)
    assert means.shape == (51, 2)
    np.testing.assert_allclose(means[0], [first.mean(), first.mean() + 0.25])
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 0.25)
    assert means[1:, 0].std() > 0


def test_joint_resamples_spread_like_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    means = resampled_means(values[None], seed=0, resamples=2000)[1:, 0]
    assert means.std() == pytest.approx(values.std() / 20, rel=0.1)


def test_a_part_sees_only_its_examples():
    values = np.array([[1.0, 1.0, 5.0, 7.0]])
    part = np.array([True, True, False, False])
    assert set(resampled_means(values, seed=0, part=part)[:, 0]) == {1.0}
    np.testing.assert_allclose(resampled_means(values, seed=0, part=~part)[0], 6.0)


def test_an_empty_part_counts_as_all():
    values = np.array([[3.0]])
    assert set(resampled_means(values, seed=0, part=np.array([False]))[:, 0]) == {3.0}


def test_one_group_has_the_width_of_its_replicates_about_the_estimate():
    replicates = np.concatenate([[[10.0]], np.linspace(0.0, 1.0, 1001)[:, None]])
    band = over_groups([replicates])
    assert band.value[0] == 10.0
    assert (band.low[0], band.high[0]) == pytest.approx((10 - 0.475, 10 + 0.475))


def test_several_groups_have_students_interval_where_it_is_wider():
    groups = [np.full((11, 1), value) for value in (0.1, 0.2, 0.3)]
    interval = over_groups(groups).at(0)
    half_width = 4.302653 * 0.1 / math.sqrt(3)
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.2 - half_width, 0.2, 0.2 + half_width))


def test_agreeing_groups_keep_the_width_of_their_examples():
    replicates = np.concatenate([[[0.0]], np.linspace(-1.0, 1.0, 1001)[:, None]])
    interval = over_groups([replicates, replicates]).at(0)
    assert (interval.low, interval.high) == pytest.approx((-0.95, 0.95))
