"""The sentences of the report and their agreement with the paper, on numbers for which both are known."""

import dataclasses

import numpy as np
import pytest
from planted import OFFLINE, ONLINE, checkpoint, origin, two_runs
from scipy import stats

from alignment_gap.evaluation.intervals import Interval
from alignment_gap.study import findings
from alignment_gap.study.analysis import compare
from alignment_gap.study.arms import ARMS


def with_gaps(mean, peak, paper="ahead", **changes):
    """A comparison with these intervals of its gaps, and with what the paper saw."""
    gaps = {"mean_gap": Interval(*mean), "peak_gap": Interval(*peak)}
    return dataclasses.replace(compare(two_runs(), ONLINE, OFFLINE), paper=paper, **gaps, **changes)


# The comparisons of a study.


def test_every_contrast_of_the_arms_is_compared_under_every_loss_and_both_metrics():
    measured = [r for r in two_runs() if r.arm != "sft"]
    measured += [dataclasses.replace(result, loss="dpo") for result in measured]
    results = [origin(rubric=0.5), *measured]
    for result in results:
        result.outcomes.setdefault("rubric", np.full(16, 0.5))
    found = findings.study_comparisons(results, ARMS)
    described = [(c.first[1], c.metric, c.first[0], c.second[0], c.paper, c.figure) for c in found]
    assert described == [
        ("ipo", "win_rate", "online", "offline", "ahead", "1"),
        ("ipo", "rubric", "online", "offline", None, ""),
        ("dpo", "win_rate", "online", "offline", None, "1"),
        ("dpo", "rubric", "online", "offline", None, ""),
    ]


def test_the_question_is_the_first_contrast_and_its_answers_are_by_win_rate():
    assert findings.question(ARMS) == ("online", "offline")
    assert findings.question(ARMS[1:]) == ("shuffled", "offline")
    assert findings.question(ARMS[2:]) == ()
    comparisons = [
        with_gaps((0, 0, 0), (0, 0, 0)),
        with_gaps((0, 0, 0), (0, 0, 0), metric="rubric"),
        with_gaps((0, 0, 0), (0, 0, 0), first=("shuffled", "ipo")),
        with_gaps((0, 0, 0), (0, 0, 0), first=("online", "dpo"), second=("offline", "dpo")),
    ]
    assert findings.answers(comparisons, ARMS) == [comparisons[0], comparisons[3]]
    assert findings.answers(comparisons, ARMS[2:]) == []


# Equal KL.


@pytest.mark.parametrize(
    ("mean", "peak", "agreement"),
    [
        ((0.1, 0.05, 0.15), (0.1, 0.02, 0.2), "agrees"),
        ((0.1, 0.05, 0.15), (0.0, -0.1, 0.1), "cannot be told"),
        ((0.0, -0.05, 0.05), (0.1, 0.05, 0.2), "cannot be told"),
        ((-0.1, -0.15, -0.05), (0.1, 0.05, 0.2), "disagrees"),
        ((0.1, 0.05, 0.15), (-0.1, -0.2, -0.05), "disagrees"),
    ],
)
def test_agreement_where_the_paper_has_one_ahead(mean, peak, agreement):
    assert findings.equal_kl_finding(with_gaps(mean, peak)).agreement == agreement


@pytest.mark.parametrize("kl", [5.0, 4.0, 3.9])
def test_no_agreement_on_a_range_of_kl_without_width(kl):
    # The best of online is far ahead, at a KL at or beyond the largest of offline, or just within it.
    results = [r for r in two_runs() if r.arm != "online"]
    results += [checkpoint("online", step, kl=kl * step, win_rate=0.9) for step in (1, 2)]
    comparison = dataclasses.replace(compare(results, ONLINE, OFFLINE), paper="ahead")
    assert comparison.peak_gap.low > 0
    assert findings.equal_kl_finding(comparison).agreement == "cannot be told"


def test_sentences_of_methods_that_share_no_kl():
    results = [r for r in two_runs() if r.arm != "online"]
    results += [checkpoint("online", step, kl=60.0 * step, win_rate=0.9) for step in (1, 2)]
    assert findings.equal_kl_finding(compare(results, ONLINE, OFFLINE)).sentence == (
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
        "Within budgets of 1 to 4 nats the best of both in win rate against the golden policy is SFT itself."
    )
    level = compare(two_runs((0.3, 0.7), (0.3, 0.7)), ONLINE, OFFLINE)
    assert "SFT itself" not in findings.equal_kl_detail(level)


@pytest.mark.parametrize(
    ("mean", "agreement"),
    [((0.0, -0.02, 0.02), "agrees"), ((0.02, -0.02, 0.06), "cannot be told"), ((0.1, 0.05, 0.15), "disagrees")],
)
def test_agreement_where_the_paper_has_both_level(mean, agreement):
    assert findings.equal_kl_finding(with_gaps(mean, mean, paper="level")).agreement == agreement


def test_a_contrast_that_the_paper_did_not_measure_has_no_agreement():
    gap = (0.1, 0.05, 0.15)
    finding = findings.equal_kl_finding(with_gaps(gap, gap, paper=None, metric="rubric"))
    assert finding.agreement == "not in the paper"
    assert "the gap in rubric score, online minus offline, is +0.100 (95" in finding.sentence


def test_sentences_are_written_from_the_numbers():
    finding = findings.equal_kl_finding(with_gaps((0.062, 0.031, 0.092), (-0.01, -0.02, 0.03)))
    assert finding.sentence == (
        "IPO: at equal KL online beats offline. Averaged over budgets of 1 to 4 nats the gap in win rate against the "
        "golden policy, online minus offline, is +6.2 points (95\u00a0% interval +3.1 to +9.2); between their peaks, "
        "at any KL, it is \u22121.0 points (95\u00a0% interval \u22122.0 to +3.0)."
    )


@pytest.mark.parametrize(
    ("online", "offline", "agreement"),
    [(0.44, 0.7, "agrees"), (0.7, 0.8, "disagrees"), (0.44, 0.5, "disagrees"), (0.55, 0.7, "cannot be told")],
)
def test_final_accuracy(online, offline, agreement):
    results = [
        checkpoint("online", 1, accuracy=0.9),
        checkpoint("online", 2, accuracy=online),
        checkpoint("offline", 2, accuracy=offline),
    ]
    finding = findings.final_accuracy_finding(results, "ipo")
    assert finding.agreement == agreement
    assert f"online {100 * online:.1f}\u00a0% (" in finding.sentence


def test_final_accuracy_without_measurements_says_nothing():
    assert findings.final_accuracy_finding(two_runs(), "ipo") is None


@pytest.mark.parametrize(
    ("online", "offline", "agreement"),
    [(-3.0, -9.0, "agrees"), (-9.0, -3.0, "disagrees"), (1.0, -3.0, "disagrees"), (-3.0, -3.0, "cannot be told")],
)
def test_winner_log_ratio_is_compared_at_equal_settings(online, offline, agreement):
    results = [
        checkpoint("online", 2, beta=0.1, chosen_log_ratio=online),
        checkpoint("offline", 2, beta=0.1, chosen_log_ratio=offline),
        checkpoint("offline", 2, beta=0.5, chosen_log_ratio=50.0),
    ]
    assert findings.log_ratio_finding(results, "ipo").agreement == agreement


def test_log_ratio_without_online_cannot_be_told():
    assert (
        findings.log_ratio_finding([checkpoint("offline", 1, chosen_log_ratio=-1.0)], "ipo").agreement
        == "cannot be told"
    )


def swept(accuracies, win_rates):
    """Runs of two checkpoints each, at settings that differ in beta."""
    return [origin()] + [
        checkpoint("offline", step, beta=0.1 * run, kl=1.0 * step, accuracy=accuracy, win_rate=win_rate)
        for run, pair in enumerate(zip(accuracies, win_rates, strict=True), start=1)
        for step, (accuracy, win_rate) in enumerate(zip(*pair, strict=True), start=1)
    ]


def test_prediction_of_win_rate_by_accuracy_is_spearmans():
    rng = np.random.default_rng(0)
    accuracies, win_rates = rng.random((8, 2)), rng.random((8, 2))
    finding = findings.prediction_finding(swept(accuracies, win_rates), OFFLINE)
    expected = stats.spearmanr(accuracies.ravel(), win_rates.ravel()).statistic
    assert f"{expected:+.2f}".replace("-", "\u2212") in finding.sentence


def test_prediction_disagrees_where_accuracy_orders_the_runs():
    ordered = np.linspace(0.4, 0.9, 12).reshape(6, 2)
    assert findings.prediction_finding(swept(ordered, ordered), OFFLINE).agreement == "disagrees"
    assert findings.prediction_finding(swept(ordered, ordered[::-1, ::-1]), OFFLINE).agreement == "agrees"


def test_prediction_needs_three_runs_and_differing_results():
    pair = np.array([[0.5, 0.6], [0.6, 0.7]])
    assert "too few" in findings.prediction_finding(swept(pair, pair), OFFLINE).sentence
    flat = np.full((4, 2), 0.5)
    assert findings.prediction_finding(swept(flat, flat), OFFLINE).agreement == "cannot be told"


def test_a_fall_after_the_peak_is_seen_and_measured():
    falling = findings.fall_finding(two_runs((0.9, 0.6), (0.8, 0.7)), [ONLINE, OFFLINE])
    assert falling.agreement == "agrees"
    assert "online \u221230.0 points" in falling.sentence and "at 4 nats" in falling.sentence
    rising = findings.fall_finding(two_runs(), [ONLINE, OFFLINE])
    assert rising.agreement == "cannot be told"
    assert rising.sentence.count("no fall that can be claimed") == 2
    assert findings.fall_finding([], [ONLINE]) is None


def test_a_fall_of_one_branch_is_not_that_of_both():
    alone = [r for r in two_runs((0.9, 0.6)) if r.arm != "offline"]
    assert findings.fall_finding(alone, [ONLINE, OFFLINE]).agreement == "cannot be told"


@pytest.mark.parametrize(
    ("rubric", "reading"), [(0.2, "over-optimised"), (0.8, "both rise"), (0.5, "no change of the rubric")]
)
def test_over_optimisation_compares_the_furthest_checkpoint_with_sft(rubric, reading):
    results = [origin(rubric=0.5), checkpoint("online", 1, kl=9.0, win_rate=0.9, rubric=rubric)]
    assert reading in findings.over_optimisation_finding(results, ONLINE).sentence


def test_over_optimisation_without_a_rubric_says_nothing():
    assert findings.over_optimisation_finding(two_runs(), ONLINE) is None


# Numbers in words.


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
    assert findings.in_words(interval, metric) == change
    assert findings.in_table(interval, metric) == table
    assert findings.level(interval, metric).startswith(level)


@pytest.mark.parametrize(("kl", "text"), [(0.123, "0.12"), (4.0, "4"), (1234.0, "1200"), (123456.0, "120000")])
def test_nats_have_two_digits(kl, text):
    assert findings.nats(kl) == text


def test_coverage_is_of_prompts_for_one_seed_and_of_seeds_for_several():
    assert "not another training run" in findings.coverage_sentence(1)
    assert "2 degrees of freedom" in findings.coverage_sentence(3)
