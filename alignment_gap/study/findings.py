"""What the numbers of a study say, in sentences, and whether that agrees with the paper (Tang et al. 2024).

Every sentence is computed, and every agreement is decided by a fixed rule on intervals, given with its function.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from alignment_gap.evaluation.intervals import RESAMPLES, Interval
from alignment_gap.study.analysis import (
    ORIGIN,
    PROPORTIONS,
    CheckpointResult,
    Comparison,
    Method,
    Runs,
    cross_fitted_best,
    furthest,
    joint_means,
    loss_name,
    measured_runs,
    methods,
    over_seeds,
    seeds_of,
)

Agreement = Literal["agrees", "disagrees", "cannot be told", "not in the paper"]

METRIC_NAMES = {
    "win_rate": "win rate against the golden policy",
    "win_rate_sft": "win rate against SFT",
    "proxy_win_rate": "win rate by the proxy",
    "rubric": "rubric score",
    "accuracy": "accuracy on D_golden",
}
_FORMS: dict[str, tuple[int, str, str]] = {
    **dict.fromkeys(PROPORTIONS, (100, ".1f", " points")),
    "nats": (1, ".2f", " nats"),
    "rubric": (1, ".3f", ""),
}
"""How a change is written: its scale, its digits, its unit."""
CHANCE = 0.55
"""The paper's "around or below 50 %": an accuracy up to this counts as chance."""
MARGIN = 0.03
"""Win rates closer than this at equal KL count as level with the paper's "about as good" and "hardly beats"."""
NARROW = 1.1
"""Shared budgets whose ends have a smaller ratio are too few for a claim of the paper, which is on a range of KL."""
STRONG_CORRELATION = 0.5
"""Accuracy that may correlate with win rate by this much is not said to predict nothing."""

_EXPECTED: dict[tuple[str, str, str], Literal["ahead", "level"]] = {
    ("online", "offline", "ipo"): "ahead",
    ("online", "offline", "best_of_n"): "ahead",
    ("online", "shuffled", "ipo"): "ahead",
    ("online", "shuffled", "best_of_n"): "level",
    ("shuffled", "offline", "ipo"): "level",
    ("shuffled", "offline", "best_of_n"): "ahead",
}
"""The paper's claims on pairs of arms under a loss."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence computed from the numbers, and whether they agree with the paper's."""

    sentence: str
    agreement: Agreement


# Findings.


def coverage_sentence(seeds: int) -> str:
    """What the intervals of a study of so many seeds cover."""
    if seeds == 1:
        return (
            "There is one seed: the intervals cover another draw of prompts, not another training run, "
            "which can move a win rate by more than they are wide."
        )
    return (
        f"There are {seeds} seeds: the intervals cover another seed (Student's t with {seeds - 1} degrees of freedom, "
        "or the bootstrap over prompts where that is wider)."
    )


def equal_kl_headline(comparison: Comparison) -> str:
    """The verdict at equal KL in one short sentence."""
    metric = "" if comparison.metric == "win_rate" else f" in {_metric_name(comparison.metric)}"
    return f"{loss_name(comparison.first[1])}: at equal KL {comparison.verdict}{metric}."


def equal_kl_detail(comparison: Comparison) -> str:
    """The size of the gap: averaged over the budgets, and between the peaks."""
    first, second = comparison.first[0], comparison.second[0]
    peak = in_words(comparison.peak_gap, comparison.metric)
    name = f"the gap in {_metric_name(comparison.metric)}, {first} minus {second}, is"
    if not len(comparison.budgets):
        one, other = map(_span, comparison.spans)
        seeds = "" if len(comparison.seeds) == 1 else f" in all {len(comparison.seeds)} seeds"
        return (
            f"They share no range of KL{seeds}: {first} was measured at {one} nats, {second} at {other} nats. "
            f"Between their peaks, at any KL, {name} {peak}."
        )
    low, high = comparison.budgets[[0, -1]]
    budgets = f"budgets of {nats(low)} to {nats(high)} nats"
    if both_at_origin(comparison):
        return f"Within {budgets} the best of both in {_metric_name(comparison.metric)} is SFT itself."
    averaged = f"At the one budget that both reach, {nats(low)} nats," if low == high else f"Averaged over {budgets}"
    return (
        f"{averaged} {name} {in_words(comparison.mean_gap, comparison.metric)}; "
        f"between their peaks, at any KL, it is {peak}."
    )


def both_at_origin(comparison: Comparison) -> bool:
    """Whether neither method has anything better than SFT, at any KL."""
    gaps = comparison.mean_gap, comparison.peak_gap
    frontiers = np.concatenate([comparison.first_frontier.value, comparison.second_frontier.value])
    return all(gap.low == gap.high == 0 for gap in gaps) and np.allclose(frontiers, comparison.origin)


def is_narrow(comparison: Comparison) -> bool:
    """Whether the shared budgets are none, or no wider than what the noise of the KL can make of one."""
    return not len(comparison.budgets) or bool(comparison.budgets[-1] < NARROW * comparison.budgets[0])


def seed_gaps_sentence(comparison: Comparison) -> str:
    """The mean gap of each of several seeds; empty for one, or where there is none."""
    if len(comparison.seed_gaps) <= 1:
        return ""
    gaps = (
        f"{_amount(gap, comparison.metric)} (seed {seed})"
        for seed, gap in zip(comparison.seeds, comparison.seed_gaps, strict=True)
    )
    return f"By seed the average gap is {', '.join(gaps)}."


def equal_kl_finding(comparison: Comparison) -> Finding:
    """The paper: online is at least as good as offline at equal KL, and its peak is higher; shuffled hardly helps.

    Where the paper has one arm ahead, it agrees if the intervals of the mean gap and of the peak gap are both above
    zero, and disagrees if either is below. Where it has them level, the mean gap has to be within or beyond `MARGIN`.
    Where the shared range of KL is none or narrow, it cannot be told.
    """
    mean, peak = comparison.mean_gap, comparison.peak_gap
    pair = comparison.first[0], comparison.second[0], comparison.first[1]
    expected = _EXPECTED.get(pair) if comparison.metric == "win_rate" else None
    agreement: Agreement = "cannot be told"
    if expected is None:
        agreement = "not in the paper"
    elif is_narrow(comparison):
        agreement = "cannot be told"
    elif expected == "ahead":
        if mean.high < 0 or peak.high < 0:
            agreement = "disagrees"
        elif mean.low > 0 and peak.low > 0:
            agreement = "agrees"
    elif mean.low > MARGIN or mean.high < -MARGIN:
        agreement = "disagrees"
    elif mean.low > -MARGIN and mean.high < MARGIN:
        agreement = "agrees"
    return Finding(f"{equal_kl_headline(comparison)} {equal_kl_detail(comparison)}", agreement)


def fall_finding(
    results: Sequence[CheckpointResult], chosen: Sequence[Method], metric: str = "win_rate"
) -> Finding | None:
    """The paper: both branches rise, then fall with KL. The fall is from the cross-fitted best to the largest KL.

    It agrees where all the chosen methods were measured and fall.
    """
    parts, falls = [], []
    for method in chosen:
        seeded = [runs for seed in seeds_of(results) if (runs := measured_runs(results, method, seed, metric))]
        if not seeded:
            continue
        last = [furthest(runs) for runs in seeded]
        fall = over_seeds(
            [
                cross_fitted_best(runs, metric) - joint_means([end], metric)[:, 0]
                for runs, end in zip(seeded, last, strict=True)
            ]
        )
        kl = np.mean([end.mean("kl") for end in last])
        falls.append(fall.low > 0)
        reading = "" if fall.low > 0 else ", no fall that can be claimed"
        parts.append(f"{method[0]} {in_words(-fall, metric)} at {nats(float(kl))} nats{reading}")
    if not parts:
        return None
    name = f"{loss_name(chosen[0][1])}, change of the {_metric_name(metric)}"
    sentence = f"{name} from its cross-fitted peak to the largest KL: {'; '.join(parts)}."
    if metric != "win_rate":
        return Finding(sentence, "not in the paper")
    return Finding(sentence, "agrees" if len(falls) == len(chosen) and all(falls) else "cannot be told")


def over_optimisation_finding(results: Sequence[CheckpointResult], method: Method) -> Finding | None:
    """Whether the true score falls below SFT's where the golden judge's win rate rises; the paper had no true score."""
    changes: dict[str, list[np.ndarray]] = {"win_rate": [], "rubric": []}
    kls = []
    for seed in seeds_of(results):
        runs = measured_runs(results, method, seed, "rubric")
        if not runs:
            continue
        ends = [runs[0][0], furthest(runs)]
        kls.append(ends[1].mean("kl"))
        for metric, values in changes.items():
            means = joint_means(ends, metric)
            values.append(means[:, 1] - means[:, 0])
    if not kls:
        return None
    judged, true = over_seeds(changes["win_rate"]), over_seeds(changes["rubric"])
    if judged.low > 0 and true.high < 0:
        reading = "the golden judge is over-optimised: it applauds while true quality falls below that of SFT"
    elif judged.low > 0 and true.low > 0:
        reading = "the golden judge and the rubric both rise above SFT"
    elif judged.low > 0:
        reading = "the golden judge's win rate rises, and no change of the rubric can be claimed"
    else:
        reading = "no rise of the golden judge's win rate can be claimed"
    return Finding(
        f"{loss_name(method[1])} {method[0]} at its largest KL, {nats(float(np.mean(kls)))} nats, against SFT: "
        f"golden win rate {in_words(judged, 'win_rate')}, rubric {in_words(true, 'rubric')}; {reading}.",
        "not in the paper",
    )


def final_accuracy_finding(results: Sequence[CheckpointResult], loss: str) -> Finding | None:
    """The paper: at the end offline policies classify 60-70 % of D_golden right, online policies about 50 % or less."""
    final = {arm: _final(results, (arm, loss), "accuracy") for arm in _trained_arms(results, loss)}
    intervals = {arm: over_seeds(list(values.values())).within(0.0, 1.0) for arm, values in final.items() if values}
    if not intervals:
        return None
    listed = "; ".join(f"{arm} {_plain(interval, 'accuracy')}" for arm, interval in intervals.items())
    online, offline = intervals.get("online"), intervals.get("offline")
    if online is None or offline is None:
        agreement: Agreement = "cannot be told"
    elif offline.low > CHANCE and online.high < CHANCE:
        agreement = "agrees"
    elif offline.high < CHANCE or online.low > CHANCE:
        agreement = "disagrees"
    else:
        agreement = "cannot be told"
    return Finding(
        f"{loss_name(loss)}, accuracy on D_golden at the end of training, mean of the runs: {listed}.",
        agreement,
    )


def log_ratio_finding(results: Sequence[CheckpointResult], loss: str) -> Finding | None:
    """The paper: the winner's log-probability falls for every method, most for offline."""
    finals = {
        arm: _final(results, (arm, loss), "chosen_log_ratio", matched=True) for arm in _trained_arms(results, loss)
    }
    finals = {arm: values for arm, values in finals.items() if values}
    if not finals:
        return None
    intervals = {arm: over_seeds(list(values.values())) for arm, values in finals.items()}
    listed = "; ".join(f"{arm} {_plain(interval, 'nats')}" for arm, interval in intervals.items())
    name = loss_name(loss)
    sentence = f"{name}, log-probability of the winner relative to SFT at the end of training: {listed}"
    online, offline = finals.get("online", {}), finals.get("offline", {})
    shared = [online[seed] - offline[seed] for seed in online if seed in offline]
    if not shared:
        return Finding(f"{sentence}.", "cannot be told")
    gap = over_seeds(shared)
    sentence = f"{sentence}; online minus offline, runs of equal settings where there are any: {in_words(gap, 'nats')}."
    if all(interval.high < 0 for interval in intervals.values()) and gap.low > 0:
        return Finding(sentence, "agrees")
    contradicted = any(interval.low > 0 for interval in intervals.values()) or gap.high < 0
    return Finding(sentence, "disagrees" if contradicted else "cannot be told")


def prediction_finding(results: Sequence[CheckpointResult], method: Method) -> Finding:
    """The paper: within offline runs accuracy does not predict win rate (Spearman's correlation over checkpoints).

    The checkpoints of a run depend on each other, so whole runs are resampled. It agrees where a strong positive
    correlation is excluded, disagrees where the whole interval is positive.
    """
    seeded = []
    for seed in seeds_of(results):
        measured = measured_runs(results, method, seed, "win_rate")
        runs = [run for run in measured if all("accuracy" in result.outcomes for result in run[1:])]
        if len(runs) >= 3:
            seeded.append(_correlations(runs, seed))
    name = f"{loss_name(method[1])} {method[0]}"
    if not seeded or any(math.isnan(values[0]) for values in seeded):
        return Finding(
            f"{name}: fewer than three runs of differing results, too few to relate accuracy to win rate.",
            "cannot be told",
        )
    rho = over_seeds(seeded).within(-1.0, 1.0)
    low, value, high = (_signs(f"{number:+.2f}") for number in (rho.low, rho.value, rho.high))
    sentence = (
        f"{name}: Spearman's correlation of accuracy with win rate over the checkpoints is {value} "
        f"(95\u00a0% interval {low} to {high}, whole runs resampled)."
    )
    if rho.low > 0:
        return Finding(sentence, "disagrees")
    return Finding(sentence, "agrees" if rho.high < STRONG_CORRELATION else "cannot be told")


def _correlations(runs: Runs, seed: int) -> Float[np.ndarray, "R"]:
    """Spearman's correlation over the checkpoints of all runs (first) and of resampled runs; nan where undefined."""
    points = [np.array([[r.mean("accuracy"), r.mean("win_rate")] for r in run[1:]]) for run in runs]
    rng = np.random.default_rng([seed, len(runs)])
    draws = [np.arange(len(runs)), *rng.integers(len(runs), size=(RESAMPLES, len(runs)))]
    return np.array([_spearman(np.concatenate([points[run] for run in draw])) for draw in draws])


def _spearman(points: Float[np.ndarray, "P 2"]) -> float:
    ranks = stats.rankdata(points, axis=0)
    ranks -= ranks.mean(axis=0)
    scale = math.sqrt(float((ranks[:, 0] ** 2).sum() * (ranks[:, 1] ** 2).sum()))
    return float(ranks[:, 0] @ ranks[:, 1]) / scale if scale else math.nan


def _trained_arms(results: Iterable[CheckpointResult], loss: str) -> list[str]:
    return [arm for arm, of in methods(results) if of == loss and arm not in (ORIGIN, "golden")]


def _final(
    results: Sequence[CheckpointResult], method: Method, metric: str, *, matched: bool = False
) -> dict[int, Float[np.ndarray, "R"]]:
    """By seed, the mean over the ends of a method's runs; if matched, of those at an online run's setting."""
    online = {r.setting for r in results if r.method == ("online", method[1])} if matched else set()
    replicates = {}
    for seed in seeds_of(results):
        last: dict[str, CheckpointResult] = {}
        for result in results:
            if result.method == method and result.seed == seed and metric in result.outcomes:
                last[result.setting] = max(last.get(result.setting, result), result, key=lambda r: r.step)
        chosen = [result for setting, result in last.items() if setting in online] or list(last.values())
        if chosen:
            replicates[seed] = joint_means(chosen, metric).mean(axis=1)
    return replicates


# Numbers in words.


def nats(kl: float) -> str:
    """A KL to two digits, never in powers of ten for being large."""
    return f"{float(f'{kl:.2g}'):g}"


def _span(kl: tuple[float, float]) -> str:
    low, high = map(nats, kl)
    return low if low == high else f"{low} to {high}"


def _metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)


def in_words(interval: Interval, metric: str) -> str:
    """A change with its interval: win rates and accuracies in percentage points."""
    scale, form, _ = _FORMS.get(metric, (1, ".3g", ""))
    low, high = _signs(f"{scale * interval.low:+{form}}"), _signs(f"{scale * interval.high:+{form}}")
    return f"{_amount(interval.value, metric)} (95\u00a0% interval {low} to {high})"


def _amount(value: float, metric: str) -> str:
    scale, form, unit = _FORMS.get(metric, (1, ".3g", ""))
    return _signs(f"{scale * value:+{form}}{unit}")


def _plain(interval: Interval, metric: str) -> str:
    """A level with its interval: win rates and accuracies in per cent, nats relative to SFT with their sign."""
    scale, form, unit = _FORMS.get(metric, (1, ".3g", ""))
    form, unit = (form, "\u00a0%") if metric in PROPORTIONS else (f"+{form}", unit)
    value, low, high = (f"{scale * end:{form}}" for end in (interval.value, interval.low, interval.high))
    return _signs(f"{value}{unit} ({low} to {high})")


def _signs(number: str) -> str:
    return number.replace("-", "\u2212")
