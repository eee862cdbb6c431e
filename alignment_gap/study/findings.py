"""Writes a study's findings in sentences: two arms at equal KL, and over-optimisation. Also formats numbers.

`claims` decides whether the numbers agree with the paper.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from alignment_gap.evaluation.fits import fit
from alignment_gap.evaluation.intervals import Interval, over_groups
from alignment_gap.study.analysis import (
    METRICS,
    Comparison,
    Method,
    Runs,
    furthest,
    joint_means,
    loss_name,
    losses_of,
    over_seeds,
)
from alignment_gap.study.arms import MAIN, Arm, Contrast
from alignment_gap.study.estimates import CORRELATION, AtEnd, Estimate, Evidence, NotMeasured, bounds

FITTED = ("win_rate", "proxy_win_rate", "rubric")
"""The scores for which curves of over-optimisation are fitted."""
FAR_APART = 0.1
"""If the gap at equal KL and the gap between the peaks differ by this much, the report explains why."""
MINUS, PERCENT = "\u2212", "\u00a0%"


# Equal KL.


def study_comparisons(evidence: Evidence, arms: Sequence[Arm]) -> list[Comparison]:
    """Every contrast of the arms that was measured, under every loss, by win rate and by rubric."""
    contrasts = [(arm.name, contrast) for arm in arms for contrast in arm.contrasts]
    found = [
        _compared(evidence, (name, loss), contrast, metric)
        for loss, metric, (name, contrast) in itertools.product(
            losses_of(evidence.results), ("win_rate", "rubric"), contrasts
        )
    ]
    return [comparison for comparison in found if comparison is not None]


def _compared(evidence: Evidence, first: Method, contrast: Contrast, metric: str) -> Comparison | None:
    second = contrast.other, contrast.loss or first[1]
    if contrast.at_shared_settings:
        try:
            evidence = evidence.with_shared_settings(first, second)
        except NotMeasured:
            return None
    return evidence.compared(first, second, metric)


def question(arms: Sequence[Arm]) -> tuple[str, ...]:
    """The two arms that the study asks about: the first contrast between its arms; empty if there is none."""
    names = {arm.name for arm in arms}
    contrasts = ((arm.name, contrast.other) for arm in arms for contrast in arm.contrasts if contrast.other in names)
    return next(contrasts, ())


def asked(comparisons: Sequence[Comparison], arms: Sequence[Arm], metric: str = "win_rate") -> list[Comparison]:
    """The comparisons of those two arms by a metric, one for each loss."""
    return [c for c in comparisons if c.metric == metric and (c.first[0], c.second[0]) == question(arms)]


def coverage_sentence(seeds: int) -> str:
    """Says what the intervals cover, given the number of seeds."""
    if seeds == 1:
        return (
            "There is one seed: the intervals cover another draw of prompts, but not another training run, "
            "which can move a win rate by more than their width."
        )
    return (
        f"There are {seeds} seeds: the intervals cover another seed (Student's t with {seeds - 1} degrees of freedom, "
        "or the bootstrap over prompts where that is wider)."
    )


def equal_kl_headline(comparison: Comparison) -> str:
    """The verdict at equal KL, in one short sentence."""
    metric = "" if comparison.metric == "win_rate" else f" in {METRICS[comparison.metric].words}"
    return f"{loss_name(comparison.first[1])}: at equal KL {comparison.verdict}{metric}."


def equal_kl_detail(comparison: Comparison) -> str:
    """The size of the gap: averaged over the budgets, and between the peaks."""
    first, second, words = comparison.first[0], comparison.second[0], METRICS[comparison.metric].words
    peak = change(comparison.peak_gap, comparison.metric)
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
    if comparison.both_at_origin:
        return f"Within {budgets} the best of {first} and of {second} in {words} is SFT itself."
    averaged = f"At the one budget that both reach, {nats(low)} nats," if low == high else f"Averaged over {budgets}"
    return (
        f"{averaged} {name} {change(comparison.mean_gap, comparison.metric)}; "
        f"between their peaks, at any KL, it is {peak}."
    )


def peaks_apart(evidence: Evidence, comparison: Comparison) -> str:
    """Why the gap between the peaks is far from the gap at equal KL; empty if it is not far."""
    metric = comparison.metric
    if not len(comparison.budgets) or abs(comparison.peak_gap.value - comparison.mean_gap.value) < FAR_APART:
        return ""
    methods, words = (comparison.first, comparison.second), METRICS[metric].words
    peaks = [_peak_kl(evidence, method, comparison) for method in methods]
    far = int(peaks[1] > peaks[0])
    arm, other = methods[far][0], methods[1 - far][0]
    best = f"under {loss_name(methods[far][1])} the best of {arm} in {words} is at {nats(peaks[far])} nats"
    reach = comparison.spans[1 - far][1]
    if peaks[far] > reach:
        return (
            f"The two gaps differ because {best}, where {other}, measured up to {nats(reach)} nats, has no checkpoint: "
            "the gap between their peaks is one at unequal KL."
        )
    low, high = map(nats, comparison.budgets[[0, -1]])
    return (
        f"The two gaps differ because {best} and that of {other} at {nats(peaks[1 - far])} nats: "
        f"the peaks are two checkpoints, the average counts every budget from {low} to {high} nats alike."
    )


def _peak_kl(evidence: Evidence, method: Method, comparison: Comparison) -> float:
    """The KL of a method's best checkpoint (or of SFT, if SFT is best); the mean over the compared seeds."""
    runs = evidence.runs(method, comparison.metric)
    best = [
        max(itertools.chain.from_iterable(runs[seed]), key=lambda result: result.mean(comparison.metric))
        for seed in comparison.seeds
    ]
    return float(np.mean([result.mean("kl") for result in best]))


def frontiers_sentence(comparison: Comparison) -> str:
    """The best of both methods within the largest shared budget; empty if they share none."""
    if not len(comparison.budgets):
        return ""
    bands = comparison.first_frontier, comparison.second_frontier
    first, second = (level(band.at(-1), comparison.metric) for band in bands)
    return (
        f"{loss_name(comparison.first[1])}: within {nats(comparison.budgets[-1])} nats, the largest budget that both "
        f"reach, the {METRICS[comparison.metric].words} is {first} for {comparison.first[0]} and {second} for "
        f"{comparison.second[0]}, in parentheses its 95{PERCENT} interval."
    )


def gaps_sentence(comparisons: Sequence[Comparison]) -> str:
    """Says for which losses a gap of two arms at equal KL can be claimed."""
    first, second = comparisons[0].first[0], comparisons[0].second[0]
    losses = {arm: [loss_name(c.first[1]) for c in comparisons if c.better == arm] for arm in (first, second, "")}
    words = {first: f"{first} is better", second: f"{second} is better", "": "neither can be claimed"}
    said = "; ".join(f"{words[arm]} under {', '.join(names)}" for arm, names in losses.items() if names)
    return f"In {METRICS[comparisons[0].metric].words} {said}."


# Along training.


def ends_sentence(evidence: Evidence, loss: str, arms: Sequence[str], metrics: Sequence[str]) -> str:
    """The means of metrics at the end of training, over all runs of each arm, with intervals; empty without any."""
    found = []
    for metric in metrics:
        values = {}
        for arm in arms:
            with contextlib.suppress(NotMeasured):
                at_end = AtEnd(((arm, loss),), metric)
                values[arm] = over_seeds([*at_end(evidence).values()]).within(*bounds(at_end))
        if values:
            each = ", ".join(f"{arm} {level(value, metric)}" for arm, value in values.items())
            found.append(f"{METRICS[metric].words} {each}")
    said = f"{loss_name(loss)}, the mean of the last checkpoints and its 95{PERCENT} interval: {'; '.join(found)}."
    return said if found else ""


def spans_sentence(evidence: Evidence, loss: str, arms: Sequence[str], metric: str) -> str:
    """The range of a metric over the checkpoints of each arm; empty if it was not measured."""
    found = []
    for arm in arms:
        measured = [r.mean(metric) for r in evidence.results if r.method == (arm, loss) and metric in r.outcomes]
        if measured:
            found.append(f"{plain(min(measured), metric)} to {plain(max(measured), metric)} ({arm})")
    return f"{loss_name(loss)}, {METRICS[metric].words} of the checkpoints: {', '.join(found)}." if found else ""


def seed_gaps_sentence(comparison: Comparison) -> str:
    """The mean gap of each seed; empty if there is only one seed or no gap."""
    if len(comparison.seed_gaps) <= 1:
        return ""
    gaps = (
        f"{_number(gap, comparison.metric, '+')}{METRICS[comparison.metric].unit} (seed {seed})"
        for seed, gap in zip(comparison.seeds, comparison.seed_gaps, strict=True)
    )
    return f"By seed the average gap is {', '.join(gaps)}."


# Over-optimisation.


def over_optimisation(evidence: Evidence, method: Method) -> str:
    """Whether the true score falls below SFT's while the golden judge's win rate rises; empty without a rubric."""
    try:
        runs = evidence.runs(method, "rubric")
    except NotMeasured:
        return ""
    ends = [(each[0][0], furthest(each)) for each in runs.values()]
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
    return (
        f"{loss_name(method[1])} {method[0]} at its largest KL, {nats(kl)} nats, against SFT: "
        f"golden win rate {change(judged, 'win_rate')}, rubric {change(true, 'rubric')}; {reading}."
    )


OverOptimisation = tuple[Method, str, str, tuple[Interval, Interval]]
"""A fitted curve: method, score, curve, and the coefficients a and b."""


def over_optimisation_fits(evidence: Evidence, arms: Sequence[Arm]) -> list[OverOptimisation]:
    """Fits the curves of Gao et al. (2210.10760) to the main arms, arms with a loss of their own, and SFT's best of n.

    The scores are the win rates by the golden judge and by the proxy and, if there is one, the rubric, each minus the
    score of SFT. Best-of-n, whether trained or chosen, has its own curve; all other methods have the curve of
    reinforcement learning.
    """
    found = []
    fitted = [arm for arm in arms if arm.panel == MAIN or arm.loss or arm.best_of]
    for loss, each, metric in itertools.product(losses_of(evidence.results), fitted, FITTED):
        arm = each.name
        try:
            runs = evidence.runs((arm, loss), metric)
        except NotMeasured:
            continue
        curve = "best_of_n" if loss == "best_of_n" or each.best_of else "rl"
        seeds = [_fit(run, metric, curve) for run in runs.values()]
        if all(coefficients is not None for coefficients in seeds):
            band = over_groups([coefficients for coefficients in seeds if coefficients is not None])
            found.append(((arm, loss), metric, curve, (band.at(0), band.at(1))))
    return found


def _fit(runs: Runs, metric: str, curve: str) -> Float[np.ndarray, "R 2"] | None:
    """The coefficients on the examples (first) and on resamples; None if there are too few KLs."""
    checkpoints = [runs[0][0], *(result for run in runs for result in run[1:])]
    means = joint_means(checkpoints, metric)
    try:
        return fit(np.array([result.mean("kl") for result in checkpoints]), means - means[:, :1], curve)
    except ValueError:
        return None


# Numbers in words.


def nats(kl: float) -> str:
    """A KL with two digits; large values are not written in powers of ten."""
    return f"{float(f'{kl:.2g}'):g}"


def _span(kl: tuple[float, float]) -> str:
    low, high = map(nats, kl)
    return low if low == high else f"{low} to {high}"


def change(interval: Interval, metric: str) -> str:
    """A change with its interval, for a sentence; for a fraction, in percentage points."""
    value, low, high = _numbers(interval, metric, "+")
    return f"{value}{METRICS[metric].unit} (95{PERCENT} interval {low} to {high})"


def in_table(interval: Interval, metric: str) -> str:
    """A change with its interval, for a table that names unit and confidence elsewhere."""
    value, low, high = _numbers(interval, metric, "+")
    return f"{value} ({low} to {high})"


def estimated(estimate: Estimate, interval: Interval) -> tuple[str, str]:
    """An estimate with its unit, and the ends of its interval."""
    if estimate.metric == CORRELATION:
        value, low, high = (
            f"{number:+.2f}".replace("-", MINUS) for number in (interval.value, interval.low, interval.high)
        )
        return value, f"{low} to {high}"
    metric = METRICS[estimate.metric]
    value, low, high = _numbers(interval, estimate.metric, "+" if estimate.is_gap else "")
    unit = PERCENT if metric.is_share and not estimate.is_gap else metric.unit
    return f"{value}{unit}", f"{low} to {high}"


def bare(estimate: Estimate, value: float) -> str:
    """A value in the format of `estimated`, without its unit."""
    return f"{value:+.2f}" if estimate.metric == CORRELATION else _number(value, estimate.metric, "")


def distance(estimate: Estimate, value: float) -> str:
    """A distance in the unit of an estimate; for a fraction, in percentage points.

    "nothing" if no value of a fraction is so far away.
    """
    if estimate.metric == CORRELATION:
        return f"{value:.2f}"
    if METRICS[estimate.metric].is_share and value > 1:
        return "nothing"
    return f"{_number(value, estimate.metric, '')}{METRICS[estimate.metric].unit}"


def plain(value: float, metric: str) -> str:
    """A mean without its interval; a fraction in per cent."""
    return f"{_number(value, metric, '')}{PERCENT if METRICS[metric].is_share else METRICS[metric].unit}"


def level(interval: Interval, metric: str) -> str:
    """A mean with its interval; a fraction in per cent."""
    _, low, high = _numbers(interval, metric, "")
    return f"{plain(interval.value, metric)} ({low} to {high})"


def _numbers(interval: Interval, metric: str, sign: str) -> list[str]:
    return [_number(value, metric, sign) for value in (interval.value, interval.low, interval.high)]


def _number(value: float, metric: str, sign: str) -> str:
    scale = 100 if METRICS[metric].is_share else 1
    return f"{scale * value:{sign}{METRICS[metric].digits}}".replace("-", MINUS)
