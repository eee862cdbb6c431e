"""The results of the analysis when the truth is known: worked out by hand, or random around a planted effect."""

import dataclasses
import math

import numpy as np
import pytest
from planted import OFFLINE, ONLINE, checkpoint, origin, two_runs
from scipy import stats

from alignment_gap.study import analysis
from alignment_gap.study.analysis import CheckpointResult, compare


def noisy_study(trial, gap, *, settings=4, size=256):
    """Online has one run, offline a sweep of equally good runs. Prompts differ in difficulty; all runs share it."""
    rng = np.random.default_rng(trial)
    difficulty = rng.uniform(-0.15, 0.15, size=size)

    def draw(arm, lr, step, kl, rate):
        wins = (rng.random(size) < rate + difficulty).astype(float)
        return CheckpointResult(arm, "ipo", 0.1, lr, 0, step, {"win_rate": wins, "kl": np.full(8, kl)})

    results = [dataclasses.replace(draw("sft", math.nan, 0, 0.0, 0.3), loss="sft")]
    for step, (kl, rate) in enumerate(((1.0, 0.5), (2.0, 0.65), (4.0, 0.7)), start=1):
        results.append(draw("online", 1e-3, step, kl, rate + gap))
        results += [draw("offline", 1e-3 * (1 + setting), step, kl, rate) for setting in range(settings)]
    return results


# The table and the peaks.


def test_table_has_the_promised_columns_and_the_means():
    results = [checkpoint("online", 3, kl=1.5, win_rate=0.75, length=7.0)]
    (row,) = analysis.results_table(results)
    metrics = ["kl", "win_rate", "win_rate_sft", "proxy_win_rate", "rubric"]
    metrics += ["accuracy", "heldout_accuracy", "stream_accuracy", "own_accuracy"]
    metrics += ["chosen_log_ratio", "rejected_log_ratio", "length"]
    columns = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    identity = ["arm", "loss", "beta", "learning_rate", "steps_factor", "size", "parameters", "seed", "step"]
    assert list(row) == [*identity, *columns] == [*analysis.COLUMNS]
    assert (row["arm"], row["step"], row["kl"], row["win_rate"], row["length_high"]) == ("online", 3, 1.5, 0.75, 7.0)
    assert math.isnan(row["rubric"])


def test_table_interval_holds_the_mean():
    wins = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=300)
    (row,) = analysis.results_table([CheckpointResult("online", "ipo", 0.1, 1e-3, 0, 1, {"win_rate": wins})])
    assert row["win_rate_low"] < row["win_rate"] < row["win_rate_high"]
    assert row["win_rate"] == pytest.approx(wins.mean())


def test_peaks_are_the_best_of_each_method_and_seed():
    results = [*two_runs(online=(0.9, 0.6)), *two_runs(seed=1)]
    found = {
        (p.checkpoint.arm, p.checkpoint.seed): (p.checkpoint.step, p.interval.value) for p in analysis.peaks(results)
    }
    assert found == {
        ("sft", 0): (0, 0.2),
        ("sft", 1): (0, 0.2),
        ("online", 0): (1, pytest.approx(0.9)),
        ("online", 1): (2, pytest.approx(0.8)),
        ("offline", 0): (2, pytest.approx(0.7)),
        ("offline", 1): (2, pytest.approx(0.7)),
    }


def test_cross_fitting_takes_the_luck_out_of_a_peak():
    optimism, honest = [], []
    for trial in range(30):
        rng = np.random.default_rng(trial)
        draws = [{"win_rate": rng.integers(0, 2, size=100).astype(float)} for _ in range(20)]
        results = [CheckpointResult("offline", "ipo", 0.1, 1e-3, 0, step, draw) for step, draw in enumerate(draws)]
        (peak,) = analysis.peaks(results)
        optimism.append(peak.interval.value - 0.5)
        honest.append(peak.cross_fitted - 0.5)
    assert np.mean(optimism) > 0.06
    assert abs(np.mean(honest)) < 0.02


def test_a_setting_in_words_leaves_out_what_the_run_has_not():
    nan = checkpoint("online", 1, loss="best_of_n", beta=math.nan)
    other = checkpoint("offline", 1, loss="best_of_n", beta=float("nan"))
    assert nan.setting == other.setting == "lr 0.001"
    assert checkpoint("online", 1).setting == "beta 0.1, lr 0.001"
    assert origin().setting == ""


def test_arms_losses_and_seeds_of_results():
    results = [*two_runs(seed=3), checkpoint("golden", 1), checkpoint("online", 1, loss="dpo"), *two_runs(seed=1)]
    assert analysis.losses_of([results[-1], checkpoint("online", 1, loss="dpo"), *results]) == ["ipo", "dpo"]
    assert analysis.losses_of(reversed(results)) == ["ipo", "dpo"]
    assert analysis.trained_arms(results, "ipo") == ["online", "offline"]
    assert analysis.trained_arms(results, "dpo") == ["online"]
    assert analysis.seeds_of(results) == [0, 1, 3]


# Equal KL.


def test_frontiers_and_gap_by_hand():
    # sqrt(KL) is 1, 1.5 and 2. At 2.25 nats the later neighbour has weight 1.25 / 3 in the mixture.
    comparison = compare(two_runs(), ONLINE, OFFLINE, points=3)
    np.testing.assert_allclose(comparison.budgets, [1.0, 2.25, 4.0])
    np.testing.assert_allclose(comparison.first_frontier.value, [0.5, 0.5 + 0.3 * 1.25 / 3, 0.8])
    np.testing.assert_allclose(comparison.second_frontier.value, [0.4, 0.4 + 0.3 * 1.25 / 3, 0.7])
    assert comparison.mean_gap.value == pytest.approx(0.1)
    assert comparison.peak_gap.value == pytest.approx(0.1)
    assert comparison.verdict == "online beats offline"


def test_a_frontier_does_not_fall_and_ends_where_the_shorter_method_ends():
    results = [*two_runs(online=(0.9, 0.3)), checkpoint("online", 3, kl=30.0, win_rate=1.0)]
    comparison = compare(results, ONLINE, OFFLINE, points=5)
    np.testing.assert_allclose(comparison.first_frontier.value, 0.9)
    assert comparison.budgets[-1] == pytest.approx(4.0)
    assert comparison.peak_gap.value == pytest.approx(0.3)


def test_a_sweep_is_pooled():
    results = [*two_runs(), checkpoint("offline", 1, beta=0.5, kl=1.0, win_rate=0.95)]
    comparison = compare(results, ONLINE, OFFLINE, points=4)
    np.testing.assert_allclose(comparison.second_frontier.value, 0.95)
    assert comparison.verdict == "offline beats online"


def test_the_origin_is_within_every_budget():
    comparison = compare(two_runs(online=(0.1, 0.05)), ONLINE, OFFLINE, points=4)
    np.testing.assert_allclose(comparison.first_frontier.value, 0.2)


def test_spacing_alone_makes_no_gap():
    dense = [checkpoint("offline", i, kl=k, win_rate=0.2 + 0.1 * k) for i, k in enumerate(np.linspace(1, 4, 13), 1)]
    sparse = [checkpoint("online", i, kl=k, win_rate=0.2 + 0.1 * k) for i, k in enumerate((1.0, 4.0), 1)]
    comparison = compare([origin(), *dense, *sparse], ONLINE, OFFLINE)
    np.testing.assert_allclose(comparison.gap.value, 0.0, atol=1e-9)


def test_swapping_the_methods_negates_everything():
    results = noisy_study(0, 0.05)
    one, other = (compare(results, *pair, resamples=100) for pair in ((ONLINE, OFFLINE), (OFFLINE, ONLINE)))
    for field in ("mean_gap", "peak_gap"):
        swapped = -getattr(other, field)
        assert dataclasses.astuple(getattr(one, field)) == pytest.approx(dataclasses.astuple(swapped))
    np.testing.assert_allclose(one.gap.low, -other.gap.high)
    assert one.verdict == other.verdict


def test_a_planted_gap_is_found_and_covered():
    gaps = [compare(noisy_study(trial, 0.12), ONLINE, OFFLINE, resamples=200) for trial in range(12)]
    assert all(comparison.mean_gap.value > 0 for comparison in gaps)
    assert sum(comparison.better == "online" for comparison in gaps) >= 10
    assert sum(comparison.mean_gap.low <= 0.12 <= comparison.mean_gap.high for comparison in gaps) >= 10


def test_no_gap_is_claimed_where_there_is_none_although_one_side_is_swept():
    gaps = [compare(noisy_study(trial, 0.0, settings=8), ONLINE, OFFLINE, resamples=100) for trial in range(20)]
    assert sum(comparison.better == "" for comparison in gaps) >= 17
    assert abs(np.mean([comparison.mean_gap.value for comparison in gaps])) < 0.015


def test_several_seeds_have_students_interval():
    results = [r for seed, lift in enumerate((0.1, 0.2, 0.3)) for r in two_runs((0.4 + lift, 0.7 + lift), seed=seed)]
    comparison = compare(results, ONLINE, OFFLINE)
    half_width = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert comparison.seed_gaps == pytest.approx((0.1, 0.2, 0.3))
    assert comparison.mean_gap.low == pytest.approx(0.2 - half_width)
    assert comparison.verdict == "no difference between online and offline can be claimed"


def test_methods_that_share_no_kl_have_peaks_but_no_gap():
    results = [origin(), *(checkpoint("offline", i, kl=k, win_rate=0.3) for i, k in enumerate((0.5, 1.0), 1))]
    results += [checkpoint("online", i, kl=k, win_rate=0.9) for i, k in enumerate((5.0, 9.0), 1)]
    comparison = compare(results, ONLINE, OFFLINE)
    assert len(comparison.budgets) == len(comparison.gap.value) == len(comparison.seed_gaps) == 0
    assert comparison.spans == ((5.0, 9.0), (0.5, 1.0))
    assert math.isnan(comparison.mean_gap.value) and comparison.better == ""
    assert comparison.verdict == "online and offline cannot be compared"
    assert comparison.peak_gap.value == pytest.approx(0.6)


def test_a_single_checkpoint_is_compared_at_its_own_kl():
    comparison = compare([*two_runs()[:1], *two_runs()[2:]], ONLINE, OFFLINE)
    assert list(comparison.budgets) == [4.0]
    assert comparison.mean_gap.value == comparison.peak_gap.value == pytest.approx(0.1)


def test_a_method_that_stays_at_the_origin_leaves_no_comparison():
    still = [dataclasses.replace(r, outcomes=r.outcomes | {"kl": np.zeros(8)}) for r in two_runs() if r.arm == "online"]
    assert compare([*still, *(r for r in two_runs() if r.arm != "online")], ONLINE, OFFLINE) is None


@pytest.mark.parametrize("missing", ["sft", "online", "offline"])
def test_a_missing_arm_leaves_no_comparison(missing):
    assert compare([result for result in two_runs() if result.arm != missing], ONLINE, OFFLINE) is None


def test_a_missing_metric_leaves_no_comparison():
    assert compare(two_runs(), ONLINE, OFFLINE, "rubric") is None


def test_a_seed_that_lacks_an_arm_is_left_out():
    results = [*two_runs(), *(result for result in two_runs(seed=1) if result.arm != "offline")]
    assert compare(results, ONLINE, OFFLINE).seeds == (0,)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_handful_of_prompts_does_not_break_it(size):
    results = [
        dataclasses.replace(result, outcomes={metric: values[:size] for metric, values in result.outcomes.items()})
        for result in two_runs()
    ]
    assert compare(results, ONLINE, OFFLINE).mean_gap.value == pytest.approx(0.1)


def test_equal_arms_differ_by_nothing_at_all():
    comparison = compare(two_runs((0.3, 0.7), (0.3, 0.7)), ONLINE, OFFLINE)
    assert dataclasses.astuple(comparison.mean_gap) == (0.0, 0.0, 0.0)
    assert comparison.better == ""
