"""What the numbers of a study say, in sentences, and whether that agrees with the paper (Tang et al. 2024).

Every sentence is computed, and every agreement is decided by a fixed rule on intervals, given with its function.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats

from alignment_gap.evaluation.intervals import RESAMPLES, Interval
from alignment_gap.study.analysis import (
    METRICS,
    CheckpointResult,
    Comparison,
    Method,
    Runs,
    compare,
    cross_fitted_best,
    furthest,
    joint_means,
    loss_name,
    losses_of,
    measured_runs,
    over_seeds,
    seeds_of,
    trained_arms,
)
from alignment_gap.study.arms import Arm

Agreement = Literal["agrees", "disagrees", "cannot be told", "not in the paper"]

MINUS, PERCENT = "\u2212", "\u00a0%"

CHANCE = 0.55
"""The paper's "around or below 50 %": an accuracy up to this counts as chance."""
MARGIN = 0.03
"""Win rates closer than this at equal KL count as level with the paper's "about as good" and "hardly beats"."""
NARROW = 1.1
"""Shared budgets whose ends have a smaller ratio are too few for a claim of the paper, which is on a range of KL."""
STRONG_CORRELATION = 0.5
"""Accuracy that may correlate with win rate by this much is not said to predict nothing."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence computed from the numbers, and whether they agree with the paper's."""

    sentence: str
    agreement: Agreement


# Equal KL.


def study_comparisons(results: Sequence[CheckpointResult], arms: Sequence[Arm]) -> list[Comparison]:
    """Every contrast of the arms that was measured, under every loss, by win rate and by rubric."""
    contrasts = [(arm.name, contrast) for arm in arms for contrast in arm.contrasts]
    found = []
    for loss, metric, (arm, contrast) in itertools.product(losses_of(results), ("win_rate", "rubric"), contrasts):
        comparison = compare(results, (arm, loss), (contrast.other, loss), metric)
        if comparison is not None and metric == "win_rate":
            comparison = dataclasses.replace(comparison, paper=contrast.paper.get(loss), figure=contrast.figure)
        found.append(comparison)
    return [comparison for comparison in found if comparison is not None]


def question(arms: Sequence[Arm]) -> tuple[str, ...]:
    """The two arms that the study asks about: the first contrast between its arms; empty if there is none."""
    names = {arm.name for arm in arms}
    contrasts = ((arm.name, contrast.other) for arm in arms for contrast in arm.contrasts if contrast.other in names)
    return next(contrasts, ())


def answers(comparisons: Sequence[Comparison], arms: Sequence[Arm]) -> list[Comparison]:
    """The comparisons of those two arms by win rate, one for each loss."""
    return [c for c in comparisons if c.metric == "win_rate" and (c.first[0], c.second[0]) == question(arms)]


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
    metric = "" if comparison.metric == "win_rate" else f" in {METRICS[comparison.metric].words}"
    return f"{loss_name(comparison.first[1])}: at equal KL {comparison.verdict}{metric}."


def equal_kl_detail(comparison: Comparison) -> str:
    """The size of the gap: averaged over the budgets, and between the peaks."""
    first, second, words = comparison.first[0], comparison.second[0], METRICS[comparison.metric].words
    peak = in_words(comparison.peak_gap, comparison.metric)
    name = f"the gap in {words}, {first} minus {second}, is"
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
        return f"Within {budgets} the best of both in {words} is SFT itself."
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
        f"{_number(gap, comparison.metric, '+')}{METRICS[comparison.metric].unit} (seed {seed})"
        for seed, gap in zip(comparison.seeds, comparison.seed_gaps, strict=True)
    )
    return f"By seed the average gap is {', '.join(gaps)}."


def equal_kl_finding(comparison: Comparison) -> Finding:
    """Whether a comparison of two arms is as the paper saw it, where it did.

    Where the paper has one arm ahead, it agrees if the intervals of the mean gap and of the peak gap are both above
    zero, and disagrees if either is below. Where it has them level, the mean gap has to be within or beyond `MARGIN`.
    Where the shared range of KL is none or narrow, it cannot be told.
    """
    mean, peak = comparison.mean_gap, comparison.peak_gap
    if comparison.paper is None:
        agreement: Agreement = "not in the paper"
    elif is_narrow(comparison):
        agreement = "cannot be told"
    elif comparison.paper == "ahead":
        agreement = _agreement(agrees=min(mean.low, peak.low) > 0, disagrees=min(mean.high, peak.high) < 0)
    else:
        agreement = _agreement(
            agrees=mean.low > -MARGIN and mean.high < MARGIN, disagrees=mean.low > MARGIN or mean.high < -MARGIN
        )
    return Finding(f"{equal_kl_headline(comparison)} {equal_kl_detail(comparison)}", agreement)


def _agreement(*, agrees: bool, disagrees: bool) -> Agreement:
    return "disagrees" if disagrees else "agrees" if agrees else "cannot be told"


# What else the paper saw.


def fall_finding(
    results: Sequence[CheckpointResult], chosen: Sequence[Method], metric: str = "win_rate"
) -> Finding | None:
    """The paper: both branches rise, then fall with KL. The fall is from the cross-fitted best to the largest KL.

    It agrees where all the chosen methods were measured and fall.
    """
    parts, falls = [], []
    for method in chosen:
        seeded = _by_seed(results, method, metric)
        if not seeded:
            continue
        last = [furthest(runs) for runs in seeded]
        ends = [joint_means([end], metric)[:, 0] for end in last]
        fall = over_seeds([cross_fitted_best(runs, metric) - end for runs, end in zip(seeded, ends, strict=True)])
        kl = np.mean([end.mean("kl") for end in last])
        falls.append(fall.low > 0)
        reading = "" if fall.low > 0 else ", no fall that can be claimed"
        parts.append(f"{method[0]} {in_words(-fall, metric)} at {nats(float(kl))} nats{reading}")
    if not parts:
        return None
    name = f"{loss_name(chosen[0][1])}, change of the {METRICS[metric].words}"
    sentence = f"{name} from its cross-fitted peak to the largest KL: {'; '.join(parts)}."
    if metric != "win_rate":
        return Finding(sentence, "not in the paper")
    return Finding(sentence, "agrees" if len(falls) == len(chosen) and all(falls) else "cannot be told")


def over_optimisation_finding(results: Sequence[CheckpointResult], method: Method) -> Finding | None:
    """Whether the true score falls below SFT's where the golden judge's win rate rises; the paper had no true score."""
    ends = [(runs[0][0], furthest(runs)) for runs in _by_seed(results, method, "rubric")]
    if not ends:
        return None
    judged, true = (
        over_seeds([np.diff(joint_means(pair, metric))[:, 0] for pair in ends]) for metric in ("win_rate", "rubric")
    )
    kl = float(np.mean([end.mean("kl") for _, end in ends]))
    if judged.low > 0 and true.high < 0:
        reading = "the golden judge is over-optimised: it applauds while true quality falls below that of SFT"
    elif judged.low > 0 and true.low > 0:
        reading = "the golden judge and the rubric both rise above SFT"
    elif judged.low > 0:
        reading = "the golden judge's win rate rises, and no change of the rubric can be claimed"
    else:
        reading = "no rise of the golden judge's win rate can be claimed"
    return Finding(
        f"{loss_name(method[1])} {method[0]} at its largest KL, {nats(kl)} nats, against SFT: "
        f"golden win rate {in_words(judged, 'win_rate')}, rubric {in_words(true, 'rubric')}; {reading}.",
        "not in the paper",
    )


def final_accuracy_finding(results: Sequence[CheckpointResult], loss: str) -> Finding | None:
    """The paper: at the end offline policies classify 60-70 % of D_golden right, online policies about 50 % or less."""
    finals = _finals(results, loss, "accuracy")
    if not finals:
        return None
    intervals = {arm: over_seeds(list(values.values())).within(0.0, 1.0) for arm, values in finals.items()}
    agreement: Agreement = "cannot be told"
    if "online" in intervals and "offline" in intervals:
        online, offline = intervals["online"], intervals["offline"]
        agreement = _agreement(
            agrees=offline.low > CHANCE > online.high, disagrees=offline.high < CHANCE or online.low > CHANCE
        )
    return Finding(f"{_ends(loss, 'accuracy', intervals)}, mean of the runs.", agreement)


def log_ratio_finding(results: Sequence[CheckpointResult], loss: str) -> Finding | None:
    """The paper: the winner's log-probability falls for every method, most for offline."""
    metric = "chosen_log_ratio"
    finals = _finals(results, loss, metric, matched=True)
    if not finals:
        return None
    intervals = {arm: over_seeds(list(values.values())) for arm, values in finals.items()}
    sentence = _ends(loss, metric, intervals)
    online, offline = finals.get("online", {}), finals.get("offline", {})
    shared = [online[seed] - offline[seed] for seed in online if seed in offline]
    if not shared:
        return Finding(f"{sentence}.", "cannot be told")
    gap = over_seeds(shared)
    sentence = f"{sentence}; online minus offline, runs of equal settings where there are any: {in_words(gap, metric)}."
    agreement = _agreement(
        agrees=all(interval.high < 0 for interval in intervals.values()) and gap.low > 0,
        disagrees=any(interval.low > 0 for interval in intervals.values()) or gap.high < 0,
    )
    return Finding(sentence, agreement)


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
    low, value, high = (f"{number:+.2f}".replace("-", MINUS) for number in (rho.low, rho.value, rho.high))
    return Finding(
        f"{name}: Spearman's correlation of accuracy with win rate over the checkpoints is {value} "
        f"(95{PERCENT} interval {low} to {high}, whole runs resampled).",
        _agreement(agrees=rho.high < STRONG_CORRELATION, disagrees=rho.low > 0),
    )


def _by_seed(results: Sequence[CheckpointResult], method: Method, metric: str) -> list[Runs]:
    """The runs of a method in every seed that measured it."""
    return [runs for seed in seeds_of(results) if (runs := measured_runs(results, method, seed, metric))]


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


def _finals(
    results: Sequence[CheckpointResult], loss: str, metric: str, *, matched: bool = False
) -> dict[str, dict[int, Float[np.ndarray, "R"]]]:
    """By arm and seed, the mean over the ends of the runs; if matched, of those at an online run's setting."""
    online = {r.setting for r in results if r.method == ("online", loss)} if matched else set()
    ends: dict[str, dict[int, Float[np.ndarray, "R"]]] = {}
    for arm, seed in itertools.product(trained_arms(results, loss), seeds_of(results)):
        measured = [r for r in results if r.method == (arm, loss) and r.seed == seed and metric in r.outcomes]
        last = {result.setting: result for result in sorted(measured, key=lambda result: result.step)}
        chosen = [result for setting, result in last.items() if setting in online] or list(last.values())
        if chosen:
            ends.setdefault(arm, {})[seed] = joint_means(chosen, metric).mean(axis=1)
    return ends


def _ends(loss: str, metric: str, intervals: Mapping[str, Interval]) -> str:
    listed = "; ".join(f"{arm} {level(interval, metric)}" for arm, interval in intervals.items())
    return f"{loss_name(loss)}, {METRICS[metric].words} at the end of training: {listed}"


# Numbers in words.


def nats(kl: float) -> str:
    """A KL to two digits, never in powers of ten for being large."""
    return f"{float(f'{kl:.2g}'):g}"


def _span(kl: tuple[float, float]) -> str:
    low, high = map(nats, kl)
    return low if low == high else f"{low} to {high}"


def in_words(interval: Interval, metric: str) -> str:
    """A change with its interval, in a sentence; that of a share in percentage points."""
    value, low, high = _numbers(interval, metric, "+")
    return f"{value}{METRICS[metric].unit} (95{PERCENT} interval {low} to {high})"


def in_table(interval: Interval, metric: str) -> str:
    """A change with its interval, in a table that names unit and confidence elsewhere."""
    value, low, high = _numbers(interval, metric, "+")
    return f"{value} ({low} to {high})"


def level(interval: Interval, metric: str) -> str:
    """A mean with its interval; a share in per cent."""
    value, low, high = _numbers(interval, metric, "")
    unit = PERCENT if METRICS[metric].is_share else METRICS[metric].unit
    return f"{value}{unit} ({low} to {high})"


def _numbers(interval: Interval, metric: str, sign: str) -> list[str]:
    return [_number(value, metric, sign) for value in (interval.value, interval.low, interval.high)]


def _number(value: float, metric: str, sign: str) -> str:
    scale = 100 if METRICS[metric].is_share else 1
    return f"{scale * value:{sign}{METRICS[metric].digits}}".replace("-", MINUS)
