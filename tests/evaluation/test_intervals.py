"""The bootstrap of a mean: comparison with the normal interval, coverage, and arrays that break a bootstrap."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from alignment_gap.evaluation.intervals import (
    Band,
    Interval,
    Spread,
    mean_interval,
    over_groups,
    resampled_means,
    resampled_part_means,
    spread_over_groups,
)


def test_matches_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2048)
    interval = mean_interval(values, resamples=4000)
    half_width = 1.96 * values.std() / math.sqrt(values.size)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half_width, abs=0.1 * half_width)
    assert interval.high == pytest.approx(values.mean() + half_width, abs=0.1 * half_width)


@pytest.mark.parametrize("size", [10, 300])
def test_matches_the_percentile_bootstrap_of_scipy(size):
    values = np.random.default_rng(1).exponential(size=size)
    interval = mean_interval(values, resamples=20_000)
    ends = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    error = 0.03 * (ends.high - ends.low)  # The ends of 20,000 resamples have a standard error of 0.5 % of the width.
    assert (interval.low, interval.high) == pytest.approx(ends, abs=error)


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


@pytest.mark.usefixtures("unchecked")
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
    within, outside = resampled_part_means(values, np.stack([part, ~part]), seed=0)
    assert set(within[0]) == {1.0}
    assert outside[0, 0] == 6.0 and set(outside[0]) == {5.0, 5.5, 17 / 3, 6.0, 19 / 3, 6.5, 7.0}


def test_parts_have_the_means_of_their_resampled_examples():
    """Against a sum over the drawn examples one by one; a column of the identity says how often its example came."""
    rng = np.random.default_rng(0)
    values, parts = rng.normal(size=(3, 12)), rng.random((5, 12)) < 0.5
    values[1, 3] = math.nan
    counts = np.rint(12 * resampled_means(np.eye(12), seed=4, resamples=30)[1:]).astype(int)
    found = resampled_part_means(values, parts, seed=4, resamples=30)
    for part, means in zip(parts, found, strict=True):
        for sample, drawn in enumerate(counts, start=1):
            times = drawn * part if (drawn * part).any() else part
            chosen = np.repeat(np.arange(12), times)
            np.testing.assert_allclose(means[:, sample], np.nanmean(values[:, chosen], axis=1), rtol=1e-12)


def test_an_empty_part_counts_as_all():
    values = np.array([[3.0]])
    assert set(resampled_part_means(values, np.array([[False]]), seed=0)[0, 0]) == {3.0}


def test_a_sample_without_any_example_of_a_part_uses_the_whole_part():
    """Of two examples, a quarter of the samples has only the second."""
    means = resampled_part_means(np.array([[2.0, 9.0]]), np.array([[True, False]]), seed=0)
    assert set(means[0, 0]) == {2.0}


def test_what_was_not_measured_on_an_example_is_left_out_of_its_row_alone():
    values = np.array([[1.0, np.nan, 5.0, 7.0], [1.0, 2.0, 3.0, 4.0]])
    means = resampled_means(values, seed=0, resamples=20)
    np.testing.assert_allclose(means[0], [13 / 3, 2.5])
    np.testing.assert_array_equal(means[:, 1], resampled_means(values[1:], seed=0, resamples=20)[:, 0])


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


def simulated_groups(rng, groups, between):
    """Replicates of a paired difference. Its expectation is 0.3; each group has its own true value."""
    replicates = []
    for _ in range(groups):
        truth = 0.3 + between * rng.standard_normal()
        shared = rng.standard_normal(60)
        outcomes = np.stack([truth + shared + 0.5 * rng.standard_normal(60), shared + 0.5 * rng.standard_normal(60)])
        means = resampled_means(outcomes, seed=int(rng.integers(1 << 30)), resamples=200)
        replicates.append(means[:, :1] - means[:, 1:])
    return replicates


@pytest.mark.parametrize(("groups", "between"), [(1, 0.0), (3, 0.0), (3, 1.0), (8, 0.2)])
def test_intervals_over_groups_cover_the_known_truth(groups, between):
    """A 95 % interval covers the truth in 285 of 300 simulations, give or take 4. The wider of two covers more."""
    rng = np.random.default_rng(groups)
    covered = 0
    for _ in range(300):
        band = over_groups(simulated_groups(rng, groups, between))
        covered += bool(band.low[0] <= 0.3 <= band.high[0])
    assert covered >= 273
    # If groups differ, only Student's interval counts, and it is exact.
    assert covered <= 297 or between < 1


def test_two_groups_that_differ_have_a_wide_interval():
    """Student's t with one degree of freedom is 12.7; normal tails would give 1.96."""
    interval = over_groups([np.full((11, 1), 0.0), np.full((11, 1), 1.0)]).at(0)
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.5 - 6.3531, 0.5, 0.5 + 6.3531), abs=1e-3)


def test_replicates_that_are_nan_are_left_out():
    replicates = np.concatenate([[[2.0]], np.linspace(0.0, 1.0, 1001)[:, None], np.full((50, 1), np.nan)])
    interval = over_groups([replicates]).at(0)
    assert (interval.low, interval.high) == pytest.approx((2 - 0.475, 2 + 0.475))


def test_each_estimate_of_a_band_is_its_own():
    replicates = np.stack([np.array([0.0, 5.0]), *([k / 1000, 5 + k / 100] for k in range(1001))])
    band = over_groups([replicates])
    for index, (value, half) in enumerate([(0.0, 0.475), (5.0, 4.75)]):
        interval = band.at(index)
        assert (interval.low, interval.value, interval.high) == pytest.approx((value - half, value, value + half))


def test_a_band_is_cut_at_both_ends():
    band = Band(np.array([0.1, 0.9]), np.array([-0.2, 0.8]), np.array([0.4, 1.3])).within(0.0, 1.0)
    np.testing.assert_array_equal(band.low, [0.0, 0.8])
    np.testing.assert_array_equal(band.high, [0.4, 1.0])
    np.testing.assert_array_equal(band.value, [0.1, 0.9])


def test_a_zero_has_no_sign():
    interval = over_groups([np.full((11, 1), -0.0)]).at(0)
    assert math.copysign(1, interval.value) == 1.0


@pytest.mark.parametrize("size", [20, 200])
def test_the_interval_of_a_mean_covers_as_often_in_small_samples(size):
    """The distribution is skewed and has mean 1. In small samples the percentile interval is a little too narrow."""
    rng = np.random.default_rng(size)
    covered = 0
    for trial in range(300):
        interval = mean_interval(rng.exponential(size=size), resamples=300, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert (258 if size == 20 else 270) <= covered <= 297


# Spreads over groups.


def replicates(groups, size=400, seed=0):
    """For each group an estimate, and replicates that scatter about it with a standard error of 0.1."""
    rng = np.random.default_rng(seed)
    return [np.concatenate([[value], rng.normal(value, 0.1, size)]) for value in groups]


@pytest.mark.parametrize("groups", [(0.5,), (0.1, 0.9), (0.5, 0.51, 0.52)])
def test_the_interval_of_a_spread_is_that_over_groups(groups):
    arrays = replicates(groups)
    band = over_groups([each[:, None] for each in arrays]).at(0)
    assert dataclasses.astuple(spread_over_groups(arrays).interval) == pytest.approx(dataclasses.astuple(band))


@pytest.mark.parametrize("groups", [(0.5,), (0.1, 0.9), (0.5, 0.51, 0.52)])
def test_a_p_value_below_one_in_twenty_is_an_interval_that_excludes_the_limit(groups):
    spread = spread_over_groups(replicates(groups))
    low, high = spread.interval.low, spread.interval.high
    for end, outwards in ((low, -1e-6), (high, 1e-6)):
        assert spread.p_value(end) == pytest.approx(0.05)
        assert spread.p_value(end + outwards) < 0.05 < spread.p_value(end - outwards)
    assert spread.p_value(spread.value) == 1.0


def test_an_estimate_without_any_error_excludes_all_but_itself():
    spread = spread_over_groups([np.full(9, 0.5)] * 3)
    assert (spread.p_value(0.5), spread.p_value(0.4), spread.detectable) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_what_is_detectable_over_groups_is_found_four_times_out_of_five(groups):
    """By simulation: Student's t of groups whose mean lies so many standard errors from the limit."""
    values = np.random.default_rng(groups).normal(size=(40_000, groups)) / 2
    distance = Spread(0.0, 0.0, 0.5 / math.sqrt(groups), groups).detectable
    t = (values.mean(1) + distance) / (values.std(1, ddof=1) / math.sqrt(groups))
    assert np.mean(t > stats.t.ppf(0.975, groups - 1)) == pytest.approx(0.8, abs=0.01)


def test_what_is_detectable_is_found_four_times_out_of_five():
    rng = np.random.default_rng(1)
    detectable = spread_over_groups(replicates((0.0,))).detectable
    found = [spread_over_groups(replicates((rng.normal(detectable, 0.1),))).p_value(0.0) < 0.05 for _ in range(400)]
    assert 0.7 < np.mean(found) < 0.9
