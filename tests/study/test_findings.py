"""The sentences of the report, for results whose right sentences are known."""

import dataclasses
import math

import numpy as np
import pytest
from planted import OFFLINE, ONLINE, checkpoint, origin, two_runs

from alignment_gap.evaluation.intervals import Interval
from alignment_gap.study import findings
from alignment_gap.study.analysis import compare
from alignment_gap.study.arms import ARMS, Contrast, arms_of
from alignment_gap.study.estimates import AtEnd, Correlation, EndGap, Evidence, Rise


def with_gaps(mean, peak, **changes):
    """A comparison whose gaps have these intervals."""
    gaps = {"mean_gap": Interval(*mean), "peak_gap": Interval(*peak)}
    return dataclasses.replace(compare(two_runs(), ONLINE, OFFLINE), **gaps, **changes)


def sentence(comparison):
    return f"{findings.equal_kl_headline(comparison)} {findings.equal_kl_detail(comparison)}"


# Peaks whose gap is far from the gap at equal KL.


def test_a_peak_beyond_the_reach_of_the_other_is_one_at_unequal_kl():
    far = [*two_runs(), checkpoint("online", 9, kl=40.0, win_rate=1.0)]
    assert findings.peaks_apart(Evidence(far), compare(far, ONLINE, OFFLINE)) == (
        "The two gaps differ because under IPO the best of online in win rate against the golden policy is at 40 nats, "
        "where offline, measured up to 4 nats, has no checkpoint: the gap between their peaks is one at unequal KL."
    )


def test_peaks_that_both_could_reach_are_two_checkpoints():
    """Online is far ahead at the largest budget, and level at the others."""
    results = two_runs((0.3, 0.9), (0.3, 0.4))
    comparison = compare(results, ONLINE, OFFLINE)
    assert findings.peaks_apart(Evidence(results), comparison) == (
        "The two gaps differ because under IPO the best of online in win rate against the golden policy is at 4 nats "
        "and that of offline at 4 nats: the peaks are two checkpoints, the average counts every budget from 1 to 4 "
        "nats alike."
    )
    near = two_runs((0.5, 0.8), (0.45, 0.75))
    assert findings.peaks_apart(Evidence(near), compare(near, ONLINE, OFFLINE)) == ""


# The comparisons of a study.


def test_every_contrast_of_the_arms_is_compared_under_every_loss_and_both_metrics():
    measured = [r for r in two_runs() if r.arm != "sft"]
    measured += [dataclasses.replace(result, loss="dpo") for result in measured]
    results = [origin(rubric=0.5), *measured]
    for result in results:
        result.outcomes.setdefault("rubric", np.full(16, 0.5))
    found = findings.study_comparisons(Evidence(results), ARMS)
    assert [(c.metric, c.first, c.second) for c in found] == [
        (metric, ("online", loss), ("offline", loss)) for loss in ("ipo", "dpo") for metric in ("win_rate", "rubric")
    ]


def test_an_arm_is_compared_with_another_under_another_loss():
    arm = dataclasses.replace(ARMS[0], contrasts=(Contrast("offline", loss="dpo"),))
    results = [dataclasses.replace(r, loss="dpo") if r.arm == "offline" else r for r in two_runs()]
    (found,) = findings.study_comparisons(Evidence(results), [arm])
    assert (found.first, found.second) == (ONLINE, ("offline", "dpo"))


def test_the_question_is_the_first_contrast_and_its_answers_are_by_win_rate():
    assert findings.question(ARMS) == ("online", "offline")
    assert findings.question(ARMS[1:]) == ("shuffled", "offline")
    assert findings.question(ARMS[2:3]) == ()
    comparisons = [
        with_gaps((0, 0, 0), (0, 0, 0)),
        with_gaps((0, 0, 0), (0, 0, 0), metric="rubric"),
        with_gaps((0, 0, 0), (0, 0, 0), first=("shuffled", "ipo")),
        with_gaps((0, 0, 0), (0, 0, 0), first=("online", "dpo"), second=("offline", "dpo")),
    ]
    assert findings.asked(comparisons, ARMS) == [comparisons[0], comparisons[3]]
    assert findings.asked(comparisons, ARMS[2:3]) == []


# Equal KL.


def test_sentences_of_methods_that_share_no_kl():
    results = [r for r in two_runs() if r.arm != "online"]
    results += [checkpoint("online", step, kl=60.0 * step, win_rate=0.9) for step in (1, 2)]
    assert sentence(compare(results, ONLINE, OFFLINE)) == (
        "IPO: at equal KL online and offline cannot be compared. They share no range of KL: online was measured at 60 "
        "to 120 nats, offline at 1 to 4 nats. Between their peaks, at any KL, the gap in win rate against the golden "
        "policy, online minus offline, is +20.0 points (95\u00a0% interval +20.0 to +20.0)."
    )
    both = [*results, *(dataclasses.replace(result, seed=1) for result in results)]
    assert "no range of KL in all 2 seeds" in findings.equal_kl_detail(compare(both, ONLINE, OFFLINE))
    assert findings.seed_gaps_sentence(compare(both, ONLINE, OFFLINE)) == ""


def test_sentences_at_one_budget_and_where_nothing_beats_sft():
    alone = compare([*two_runs()[:1], *two_runs()[2:]], ONLINE, OFFLINE)
    assert "At the one budget that both reach, 4 nats, the gap" in findings.equal_kl_detail(alone)
    worse = compare(two_runs((0.1, 0.0), (0.15, 0.05)), ONLINE, OFFLINE)
    assert findings.equal_kl_detail(worse) == (
        "Within budgets of 1 to 4 nats the best of online and of offline in win rate against the golden policy is SFT "
        "itself."
    )
    level = compare(two_runs((0.3, 0.7), (0.3, 0.7)), ONLINE, OFFLINE)
    assert "SFT itself" not in findings.equal_kl_detail(level)


def test_sentences_are_written_from_the_numbers():
    assert sentence(with_gaps((0.062, 0.031, 0.092), (-0.01, -0.02, 0.03))) == (
        "IPO: at equal KL online beats offline. Averaged over budgets of 1 to 4 nats the gap in win rate against the "
        "golden policy, online minus offline, is +6.2 points (95\u00a0% interval +3.1 to +9.2); between their peaks, "
        "at any KL, it is \u22121.0 points (95\u00a0% interval \u22122.0 to +3.0)."
    )


# Over-optimisation.


@pytest.mark.parametrize(
    ("rubric", "reading"), [(0.2, "over-optimised"), (0.8, "both rise"), (0.5, "no change of the rubric")]
)
def test_over_optimisation_compares_the_furthest_checkpoint_with_sft(rubric, reading):
    results = [origin(rubric=0.5), checkpoint("online", 1, kl=9.0, win_rate=0.9, rubric=rubric)]
    assert reading in findings.over_optimisation(Evidence(results), ONLINE)


def test_over_optimisation_without_a_rubric_says_nothing():
    assert findings.over_optimisation(Evidence(two_runs()), ONLINE) == ""


def test_fits_are_of_every_arm_and_score_and_find_the_curve():
    """The win rates are SFT's plus d(a - b log d), with d = sqrt(KL), a = 0.1 and b = 0.02."""
    d = np.array([0.5, 1.0, 2.0, 3.0])
    wins = 0.2 + d * (0.1 - 0.02 * np.log(d))
    points = enumerate(zip((d**2).tolist(), wins.tolist(), strict=True), 1)
    results = [origin(), *(checkpoint("online", step, kl=kl, win_rate=win) for step, (kl, win) in points)]
    arms = arms_of(("online", "offline", "low_beta"))
    ((method, metric, curve, (a, b)),) = findings.over_optimisation_fits(Evidence(results), arms)
    assert (method, metric, curve) == (ONLINE, "win_rate", "rl")
    assert (a.value, b.value) == (pytest.approx(0.1), pytest.approx(0.02))
    assert findings.over_optimisation_fits(Evidence(results[:2]), arms) == []


def a_run(arm, win_rate, **identity):
    return [checkpoint(arm, step, kl=kl, win_rate=win_rate, **identity) for step, kl in ((1, 1.0), (2, 4.0))]


def test_arms_with_a_loss_of_their_own_are_fitted_too():
    results = [origin(), *a_run("chi_po", 0.4, loss="chi_po")]
    (found,) = findings.over_optimisation_fits(Evidence(results), arms_of(("chi_po", "low_beta")))
    assert found[:3] == (("chi_po", "chi_po"), "win_rate", "rl")


def test_arms_that_differ_in_their_data_are_compared_at_settings_that_both_have():
    """A sweep of the other arm reaches other policies, which say nothing about the data."""
    arms, swept = arms_of(("online", "offline", "final_vs_final")), a_run("offline", 0.9, beta=0.01)
    results = [origin(), *swept, *a_run("final_vs_final", 0.4)]
    (comparison,) = findings.study_comparisons(Evidence([*results, *a_run("offline", 0.3)]), arms)
    assert comparison.first[0] == "final_vs_final" and comparison.peak_gap.value == pytest.approx(0.1)
    assert findings.study_comparisons(Evidence(results), arms) == []


def test_the_best_of_n_samples_of_sft_are_fitted_to_the_curve_of_best_of_n():
    """The win rates are SFT's plus d(a - b d), with a = 0.1, b = 0.02 and the KL of best-of-n."""
    kls = [math.log(n) - (n - 1) / n for n in (2, 4, 8, 16)]
    points = enumerate(((kl, 0.2 + kl**0.5 * (0.1 - 0.02 * kl**0.5)) for kl in kls), 1)
    results = [origin(), *(checkpoint("sft_best_of_n", n, kl=kl, win_rate=win) for n, (kl, win) in points)]
    ((method, _, curve, (a, b)),) = findings.over_optimisation_fits(Evidence(results), arms_of(("sft_best_of_n",)))
    assert (method, curve) == (("sft_best_of_n", "ipo"), "best_of_n")
    assert (a.value, b.value) == (pytest.approx(0.1), pytest.approx(0.02))


# Numbers as words.


@pytest.mark.parametrize(
    ("metric", "change", "table", "level"),
    [
        (
            "win_rate",
            "+50.0 points (95\u00a0% interval \u221225.0 to +75.0)",
            "+50.0 (\u221225.0 to +75.0)",
            "50.0\u00a0% (",
        ),
        ("kl", "+0.50 nats (95\u00a0% interval \u22120.25 to +0.75)", "+0.50 (\u22120.25 to +0.75)", "0.50 nats ("),
        ("rubric", "+0.500 (95\u00a0% interval \u22120.250 to +0.750)", "+0.500 (\u22120.250 to +0.750)", "0.500 ("),
    ],
)
def test_shares_are_in_per_cent_and_their_changes_in_points(metric, change, table, level):
    interval = Interval(0.5, -0.25, 0.75)
    assert findings.change(interval, metric) == change
    assert findings.in_table(interval, metric) == table
    assert findings.level(interval, metric).startswith(level)


@pytest.mark.parametrize(
    ("estimate", "value", "ends", "distance", "bare"),
    [
        (Rise(ONLINE), "+50.0 points", "\u221225.0 to +75.0", "12.5 points", "3.0"),
        (AtEnd((ONLINE,), "accuracy"), "50.0\u00a0%", "\u221225.0 to 75.0", "12.5 points", "3.0"),
        (EndGap(ONLINE, OFFLINE, "chosen_log_ratio"), "+0.50 nats", "\u22120.25 to +0.75", "0.12 nats", "0.03"),
        (Correlation(ONLINE, "accuracy", "win_rate"), "+0.50", "\u22120.25 to +0.75", "0.12", "+0.03"),
    ],
)
def test_estimates_are_written_in_their_unit(estimate, value, ends, distance, bare):
    assert findings.estimated(estimate, Interval(0.5, -0.25, 0.75)) == (value, ends)
    assert findings.distance(estimate, 0.125) == distance
    assert (findings.distance(estimate, 1.2) == "nothing") == ("points" in distance)
    assert findings.bare(estimate, 0.03) == bare


@pytest.mark.parametrize(("kl", "text"), [(0.123, "0.12"), (4.0, "4"), (1234.0, "1200"), (123456.0, "120000")])
def test_nats_have_two_digits(kl, text):
    assert findings.nats(kl) == text


def test_coverage_is_of_prompts_for_one_seed_and_of_seeds_for_several():
    assert "not another training run" in findings.coverage_sentence(1)
    assert "2 degrees of freedom" in findings.coverage_sentence(3)


def test_what_figures_show_is_said_in_numbers():
    evidence = Evidence(two_runs())
    assert findings.frontiers_sentence(compare(two_runs(), ONLINE, OFFLINE)) == (
        "IPO: within 4 nats, the largest budget that both reach, the win rate against the golden policy is 80.0\u00a0% "
        "(80.0 to 80.0) for online and 70.0\u00a0% (70.0 to 70.0) for offline, in parentheses its 95\u00a0% interval."
    )
    arms = ("online", "shuffled", "offline")
    assert findings.ends_sentence(evidence, "ipo", arms, ("win_rate", "kl", "rubric")) == (
        "IPO, the mean of the last checkpoints and its 95\u00a0% interval: win rate against the golden policy online "
        "80.0\u00a0% (80.0 to 80.0), offline 70.0\u00a0% (70.0 to 70.0); KL to SFT online 4.00 nats (4.00 to 4.00), "
        "offline 4.00 nats (4.00 to 4.00)."
    )
    assert findings.spans_sentence(evidence, "ipo", arms, "kl") == (
        "IPO, KL to SFT of the checkpoints: 1.00 nats to 4.00 nats (online), 1.00 nats to 4.00 nats (offline)."
    )
    assert findings.ends_sentence(evidence, "ipo", arms, ("rubric",)) == ""
    assert findings.spans_sentence(evidence, "dpo", arms, "kl") == ""
