"""The claims of the paper: one rule decides them; results whose answer is known by hand test it."""

import dataclasses
import math
import re

import numpy as np
import pytest
from planted import OFFLINE, ONLINE, checkpoint, origin, two_runs
from scipy import stats

from alignment_gap.errors import UserError
from alignment_gap.study import claims
from alignment_gap.study.analysis import METRICS
from alignment_gap.study.claims import ABOVE_ZERO, CLAIMS, LEVEL, Claim, answers, claims_of
from alignment_gap.study.estimates import (
    AtEnd,
    Correlation,
    Difference,
    EndGap,
    EqualKl,
    Evidence,
    Fall,
    Narrowing,
    NotMeasured,
    PeakGap,
    ProxyLead,
    Rise,
)

AHEAD = Claim("ahead", "One is ahead.", "1", 0, EqualKl(ONLINE, OFFLINE), ABOVE_ZERO)
LEVEL_CLAIM = dataclasses.replace(AHEAD, name="level", holds=LEVEL)
# A claim from the user's own module.
OWN, NO_CLAIM, TWIN = dataclasses.replace(AHEAD, name="own"), "own", dataclasses.replace(CLAIMS[0])


def seeds_with(*gaps):
    """One seed for each gap between online and offline. The gap is the same at every KL."""
    return [r for seed, gap in enumerate(gaps) for r in two_runs((0.4 + gap, 0.6 + gap), (0.4, 0.6), seed)]


def answer(results, claim=AHEAD, *others):
    return answers(Evidence(results), [claim, *others])[0]


def estimate(estimate, results):
    """The estimate for every seed, on all its examples, without resampling."""
    return {seed: pytest.approx(float(values[0])) for seed, values in estimate(Evidence(results)).items()}


# The rule.


@pytest.mark.parametrize(
    ("gaps", "claim", "verdict"),
    [
        ((0.1, 0.11, 0.12), AHEAD, "agrees"),
        ((-0.1, -0.11, -0.12), AHEAD, "disagrees"),
        ((0.1, -0.1, 0.02), AHEAD, "cannot be told"),
        ((0.1, 0.2, 0.3), AHEAD, "cannot be told"),
        ((0.001, 0.0, -0.001), LEVEL_CLAIM, "agrees"),
        ((0.1, 0.11, 0.12), LEVEL_CLAIM, "disagrees"),
        ((-0.1, -0.11, -0.12), LEVEL_CLAIM, "disagrees"),
        ((0.02, 0.04, 0.03), LEVEL_CLAIM, "cannot be told"),
        ((0.0, 0.0, 0.0), AHEAD, "cannot be told"),
    ],
)
def test_a_claim_is_decided_where_the_interval_is_inside_or_outside_of_its_range(gaps, claim, verdict):
    found = answer(seeds_with(*gaps), claim)
    assert found.verdict == verdict
    assert found.interval.value == pytest.approx(np.mean(gaps))
    assert found.seeds == (0, 1, 2)
    assert bool(found.reason) == (verdict == "cannot be told")


@pytest.mark.parametrize(("size", "verdict"), [(4, "cannot be told"), (400, "agrees")])
def test_examples_that_are_all_alike_leave_room_for_unlike_ones(size, verdict):
    """If 30 % of all examples were unlike, 8 alike ones would have a chance of 0.7 ** 8, above 5 %."""
    claim = dataclasses.replace(AHEAD, estimate=AtEnd((ONLINE,), "accuracy"), holds=(0.7, 1.1))
    found = answer([checkpoint("online", 1, seed=seed, size=size, kl=1.0, accuracy=1.0) for seed in (0, 1)], claim)
    assert found.verdict == verdict
    assert found.interval.high == 1 and found.interval.low ** (2 * size) == pytest.approx(0.05)


def test_numbers_of_an_answer_by_hand():
    """Student's t with two degrees of freedom over the seeds; all examples of a seed are equal."""
    found = answer(seeds_with(0.1, 0.2, 0.3))
    error = 0.1 / math.sqrt(3)
    half_width = stats.t.ppf(0.975, 2) * error
    assert dataclasses.astuple(found.interval) == pytest.approx((0.2, 0.2 - half_width, 0.2 + half_width))
    assert found.p_value == pytest.approx(2 * stats.t.sf(0.2 / error, 2)) == pytest.approx(0.0742, abs=1e-4)
    assert found.adjusted == found.p_value
    assert stats.nct.sf(stats.t.ppf(0.975, 2), 2, found.detectable / error) == pytest.approx(0.8)
    assert found.reason == "the interval leaves both open"


def test_one_seed_decides_nothing_and_says_so():
    assert answer(seeds_with(0.2)).verdict == "cannot be told"
    assert answer(seeds_with(0.2)).reason == "one seed; over its examples alone it agrees"
    assert answer(seeds_with(-0.2)).reason == "one seed; over its examples alone it disagrees"
    assert answer(seeds_with(0.0)).reason == "one seed"
    assert math.isnan(answer(seeds_with(0.2)).adjusted)


@pytest.mark.parametrize("missing", ["online", "offline", "sft"])
def test_a_missing_arm_is_named(missing):
    found = answer([result for result in seeds_with(0.1, 0.1) if result.arm != missing])
    assert (found.verdict, found.interval, found.seeds) == ("cannot be told", None, ())
    assert ("online" if missing == "sft" else missing) in found.reason and "was not trained" in found.reason


@pytest.mark.parametrize(("kl", "reason"), [(60.0, "share no range of KL"), (3.9, "share a narrow range of KL only")])
def test_methods_that_share_no_kl_or_hardly_any_are_not_compared(kl, reason):
    results = [r for r in seeds_with(0.1, 0.1) if r.arm != "online"]
    results += [checkpoint("online", step, kl=kl * step, win_rate=0.9, seed=seed) for seed in (0, 1) for step in (1, 2)]
    assert answer(results).verdict == "cannot be told"
    assert reason in answer(results).reason
    assert answer(results, dataclasses.replace(AHEAD, estimate=PeakGap(ONLINE, OFFLINE))).verdict == "agrees"


def test_methods_that_are_worse_than_sft_are_not_called_level():
    """Within every budget the best of both is SFT, so their gap is 0, whatever they did to the policy."""
    worse = [r for seed in (0, 1) for r in two_runs((0.1, 0.05), (0.01, 0.0), seed)]
    found = answer(worse, LEVEL_CLAIM)
    assert (found.verdict, found.interval) == ("cannot be told", None)
    assert found.reason == "neither online IPO nor offline IPO beats SFT"
    assert answer([r for seed in (0, 1) for r in two_runs((0.5, 0.5), (0.01, 0.0), seed)]).verdict == "agrees"


def test_the_correction_is_for_the_number_of_claims_that_were_measured():
    results = seeds_with(0.1, 0.13, 0.16)
    alone = answer(results)
    assert alone.verdict == "agrees" and 0.01 < alone.p_value < 0.05
    # No data can decide these claims: the estimate is at the end of their range.
    open_claims = [
        dataclasses.replace(AHEAD, name=f"open {number}", holds=(alone.interval.value, math.inf)) for number in range(9)
    ]
    found = answer(results, AHEAD, *open_claims)
    assert found.p_value == alone.p_value and found.adjusted == pytest.approx(10 * alone.p_value)
    assert found.verdict == "cannot be told"
    assert found.reason == "it agrees by itself, not after the correction for the number of claims"
    missing = [dataclasses.replace(claim, estimate=Rise(("no", "ipo"))) for claim in open_claims]
    assert answer(results, AHEAD, *missing).adjusted == alone.p_value


def test_answers_come_in_the_order_of_the_claims():
    unmeasured = dataclasses.replace(AHEAD, name="unmeasured", estimate=Rise(("no", "ipo")))
    found = answers(Evidence(seeds_with(0.1, 0.1)), [unmeasured, AHEAD])
    assert [each.claim.name for each in found] == ["unmeasured", "ahead"]


def test_an_interval_has_no_values_that_are_impossible():
    results = [origin(seed) for seed in (0, 1)]
    results += [checkpoint("online", 1, seed=seed, accuracy=accuracy) for seed, accuracy in ((0, 0.9), (1, 0.6))]
    found = answer(results, dataclasses.replace(AHEAD, estimate=AtEnd((ONLINE,), "accuracy")))
    assert (found.interval.low, found.interval.high) == (0.0, 1.0)


# The estimates.


def test_gaps_rises_and_falls_by_hand():
    results = two_runs(online=(0.9, 0.6), offline=(0.4, 0.7))
    assert estimate(PeakGap(ONLINE, OFFLINE), results) == {0: 0.2}
    assert estimate(Rise(ONLINE), results) == {0: 0.7}
    assert estimate(Fall(ONLINE), results) == {0: 0.3}
    assert estimate(Fall(OFFLINE), results) == {0: 0.0}


def test_at_shared_settings_a_sweep_has_no_more_tries_than_one_run():
    results = [*two_runs(), checkpoint("offline", 1, beta=0.5, kl=1.0, win_rate=0.95)]
    assert estimate(EqualKl(ONLINE, OFFLINE, at_shared_settings=True), results) == {0: 0.1}
    assert estimate(EqualKl(ONLINE, OFFLINE), results)[0].expected < 0
    apart = [dataclasses.replace(r, beta=0.5) if r.arm == "offline" else r for r in two_runs()]
    assert estimate(PeakGap(ONLINE, OFFLINE, at_shared_settings=True), results) == {0: 0.1}
    with pytest.raises(NotMeasured, match="online IPO and offline IPO were trained at no setting that both have"):
        EqualKl(ONLINE, OFFLINE, at_shared_settings=True)(Evidence(apart))
    with pytest.raises(NotMeasured, match="offline IPO was not trained"):
        EqualKl(ONLINE, OFFLINE, at_shared_settings=True)(Evidence([r for r in apart if r.arm != "offline"]))


def test_ends_are_the_last_checkpoints_averaged_over_the_runs():
    results = [
        checkpoint("online", 1, accuracy=0.9, chosen_log_ratio=0.0),
        checkpoint("online", 2, accuracy=0.4, chosen_log_ratio=-3.0),
        checkpoint("offline", 2, accuracy=0.6, chosen_log_ratio=-9.0),
        checkpoint("offline", 2, beta=0.5, accuracy=0.8, chosen_log_ratio=50.0),
    ]
    assert estimate(AtEnd((ONLINE,), "accuracy"), results) == {0: 0.4}
    assert estimate(AtEnd((OFFLINE,), "accuracy"), results) == {0: 0.7}
    assert estimate(AtEnd((ONLINE, OFFLINE), "accuracy"), results) == {0: 0.7}
    assert estimate(AtEnd((OFFLINE,), "accuracy", settings_of=ONLINE), results) == {0: 0.6}
    with pytest.raises(NotMeasured, match="trained at no setting that both have"):
        AtEnd((OFFLINE,), "accuracy", settings_of=ONLINE)(Evidence([results[1], results[3]]))
    # The run of the sweep with the online setting; if there is none, all runs of the sweep.
    assert estimate(EndGap(ONLINE, OFFLINE, "chosen_log_ratio"), results) == {0: 6.0}
    assert estimate(EndGap(ONLINE, OFFLINE, "chosen_log_ratio"), [results[1], results[3]]) == {0: -53.0}


def test_the_proxy_leads_by_its_accuracy_over_that_of_the_best_policy():
    results = [checkpoint("online", 1, heldout_accuracy=0.5), checkpoint("offline", 1, heldout_accuracy=0.6)]
    proxy = checkpoint("proxy", 4, loss="preference", heldout_accuracy=0.85)
    lead = ProxyLead((ONLINE, OFFLINE), "heldout_accuracy")
    assert estimate(lead, [*results, proxy]) == {0: 0.25}
    # A sweep counts by its best run.
    better = checkpoint("offline", 1, beta=0.5, heldout_accuracy=0.8)
    assert estimate(lead, [*results, better, proxy]) == {0: 0.05}
    with pytest.raises(NotMeasured, match="proxy was not trained, or its accuracy on held-out pairs"):
        lead(Evidence(results))
    with pytest.raises(NotMeasured, match="no seed has all"):
        lead(Evidence([*results, dataclasses.replace(proxy, seed=1)]))


def test_the_best_of_many_runs_that_guess_does_not_look_better_than_guessing():
    guesses = np.random.default_rng(0).integers(0, 2, (40, 400)).astype(float)
    runs = [
        dataclasses.replace(checkpoint("offline", 1, beta=0.1 * run), outcomes={"heldout_accuracy": guess})
        for run, guess in enumerate(guesses, start=1)
    ]
    proxy = checkpoint("proxy", 4, loss="preference", size=400, heldout_accuracy=0.9)
    assert guesses.mean(1).max() > 0.54
    found = ProxyLead((OFFLINE,), "heldout_accuracy")(Evidence([*runs, proxy]))
    assert found[0][0] == pytest.approx(0.4, abs=0.02)


def swept(accuracies, win_rates):
    """Runs with two checkpoints each; the runs differ in beta."""
    return [origin()] + [
        checkpoint("offline", step, beta=0.1 * run, kl=1.0 * step, accuracy=accuracy, win_rate=win_rate)
        for run, pair in enumerate(zip(accuracies, win_rates, strict=True), start=1)
        for step, (accuracy, win_rate) in enumerate(zip(*pair, strict=True), start=1)
    ]


def test_the_correlation_is_spearmans_over_the_checkpoints():
    rng = np.random.default_rng(0)
    accuracies, win_rates = rng.random((8, 2)), rng.random((8, 2))
    correlation = Correlation(OFFLINE, "accuracy", "win_rate")
    expected = stats.spearmanr(accuracies.ravel(), win_rates.ravel()).statistic
    assert estimate(correlation, swept(accuracies, win_rates)) == {0: expected}
    ordered = np.linspace(0.4, 0.9, 12).reshape(6, 2)
    assert estimate(correlation, swept(ordered, ordered)) == {0: 1.0}


@pytest.mark.parametrize("accuracies", [np.array([[0.5, 0.6], [0.6, 0.7]]), np.full((4, 2), 0.5)])
def test_a_correlation_needs_three_runs_of_differing_results(accuracies):
    with pytest.raises(NotMeasured, match="offline IPO has fewer than 3 runs of differing results"):
        Correlation(OFFLINE, "accuracy", "win_rate")(Evidence(swept(accuracies, accuracies)))


def at_sizes(**gaps):
    """Online is ahead of offline by a gap that depends on the size, and ahead of shuffled by half of it."""
    for parameters, (size, gap) in enumerate(gaps.items(), start=1):
        results = two_runs((0.4, 0.6), (0.4 - gap, 0.6 - gap))
        results += [
            dataclasses.replace(r, arm="shuffled", outcomes=r.outcomes | {"win_rate": r.outcomes["win_rate"] - gap / 2})
            for r in results
            if r.arm == "online"
        ]
        for result in results:
            yield dataclasses.replace(result, size=size.strip("_"), parameters=parameters)


def test_the_gap_narrows_by_that_of_the_smallest_less_that_of_the_largest():
    results = list(at_sizes(_=0.2, middle=0.9, large=0.08))
    offline, shuffled = Narrowing(ONLINE, OFFLINE), Narrowing(ONLINE, ("shuffled", "ipo"))
    assert estimate(offline, results) == {0: 0.12}
    assert estimate(shuffled, results) == {0: 0.06}
    assert estimate(Difference(shuffled, offline), results) == {0: -0.06}
    # A further run of a sweep is no try that the other method had.
    swept = [dataclasses.replace(r, beta=0.5) for r in results if r.arm == "shuffled" and r.size == "large"]
    better = [dataclasses.replace(r, outcomes=r.outcomes | {"win_rate": r.outcomes["win_rate"] + 0.3}) for r in swept]
    assert estimate(shuffled, [*results, *better]) == {0: 0.06}
    with pytest.raises(NotMeasured, match="policies of one size"):
        offline(Evidence(list(at_sizes(_=0.2))))


def test_other_sizes_are_not_pooled_with_the_studys_own():
    results = list(at_sizes(_=0.2, large=0.0))
    assert estimate(PeakGap(ONLINE, OFFLINE), results) == {0: 0.2}


# The table.


def test_every_hypothesis_has_claims_and_every_claim_can_be_read():
    assert {claim.hypothesis for claim in CLAIMS} == set(range(7))
    for claim in CLAIMS:
        assert re.fullmatch(r"[a-z-]+", claim.name) and claim.paper.endswith(".") and claim.figure
        low, high = claim.holds
        assert low < high and str(claim.estimate)
        assert claim.estimate.metric in {*METRICS, "correlation"}
    assert len({claim.name for claim in CLAIMS}) == len({claim.paper for claim in CLAIMS}) == len(CLAIMS)


def test_without_results_nothing_can_be_told():
    found = answers(Evidence([]), CLAIMS)
    assert {each.verdict for each in found} == {"cannot be told"} and all(each.reason for each in found)


def test_claims_of_ones_own_come_after_those_of_the_paper():
    assert claims_of(()) == CLAIMS
    assert claims_of(("test_claims:OWN",)) == (*CLAIMS, OWN)
    for name in ("test_claims:NO_CLAIM", "own"):
        with pytest.raises(UserError, match=f"claims has '{name}', which is not a claim: write module:object"):
            claims_of((name,))
    with pytest.raises(UserError, match=f"claims has a second '{CLAIMS[0].name}': rename it"):
        claims_of(("test_claims:TWIN",))


@pytest.mark.parametrize("count", [1, 2])
def test_no_claim_rests_on_fewer_seeds_than_it_should(count):
    found = answers(Evidence(seeds_with(*[0.1] * count)), CLAIMS)
    decided = [each for each in found if each.verdict != "cannot be told"]
    assert bool(decided) == (count >= claims.FEWEST_SEEDS)
