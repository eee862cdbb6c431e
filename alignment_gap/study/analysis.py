"""Analyses the numbers of a study: the table of results, the peaks, and whether one source beats another at equal KL.

Everything is computed from `CheckpointResult`s, which hold numpy arrays with one entry per example. All checkpoints of
one seed have the same examples in the same order, so every contrast is paired: each resample of the examples is used
for all checkpoints, and their common variation cancels.

With one seed, intervals cover another draw of prompts, but not another training run. With several seeds, intervals
cover another seed: they are the wider of the bootstrap over prompts and Student's t over the seeds' estimates. The
seeds themselves are not bootstrapped, because with two to five seeds such intervals are far too narrow.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from alignment_gap.evaluation.intervals import (
    RESAMPLES,
    Band,
    Interval,
    mean_interval,
    over_groups,
    resampled_means,
    resampled_part_means,
)
from alignment_gap.evaluation.results import means

Method = tuple[str, str]
"""An arm and a loss; the runs of a sweep are pooled."""

Runs = list[list["CheckpointResult"]]
"""The runs of one method in one seed; each run is a list of checkpoints, ordered by step."""

ORIGIN, OPPONENT = "sft", "golden"
"""The policies of a study that are not arms: the policy that all arms start from, and the opponent of the win rate."""

PROXY: Method = ("proxy", "preference")
"""The proxy preference model in the results: a classifier, not an arm."""

IDENTITY = ("arm", "loss", "beta", "learning_rate", "steps_factor", "size", "parameters", "seed", "step")


class Metric(NamedTuple):
    """A metric of checkpoints, and how it is formatted.

    Attributes:
      words: its name in sentences, in titles and on axes.
      outcome: its name among the outcomes of an evaluation.
      unit: the unit of a change, written after the number.
      digits: the format of a number.
      is_share: whether it is a fraction from 0 to 1; it is shown in per cent, and a change in percentage points.
    """

    words: str
    outcome: str
    unit: str = " points"
    digits: str = ".1f"
    is_share: bool = True


METRICS = {
    "kl": Metric("KL to SFT", "kl", " nats", ".2f", is_share=False),
    "win_rate": Metric("win rate against the golden policy", "win_rate.golden.golden"),
    "win_rate_sft": Metric("win rate against SFT", "win_rate.golden.sft"),
    "proxy_win_rate": Metric("win rate by the proxy", "win_rate.proxy.golden"),
    "rubric": Metric("rubric score", "reward.rubric", "", ".3f", is_share=False),
    "accuracy": Metric("accuracy on D_golden", "accuracy"),
    "heldout_accuracy": Metric("accuracy on held-out pairs of D_golden", "accuracy.heldout"),
    "stream_accuracy": Metric("accuracy on D_online", "accuracy.stream"),
    "own_accuracy": Metric("accuracy on own samples", "accuracy.own"),
    "chosen_log_ratio": Metric("winner's log-ratio to SFT", "chosen_log_ratio", " nats", ".2f", is_share=False),
    "rejected_log_ratio": Metric("loser's log-ratio to SFT", "rejected_log_ratio", " nats", ".2f", is_share=False),
    "length": Metric("length", "length", " tokens", ".1f", is_share=False),
}
COLUMNS = (*IDENTITY, *(f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")))
LOSS_NAMES = {"ipo": "IPO", "dpo": "DPO", "slic": "SLiC", "best_of_n": "Best-of-n", "sft": "SFT"}
_SPLITS = 8
# Entries of results that are not arms: two policies, and the proxy as a classifier.
POLICIES_BESIDE_ARMS = (ORIGIN, OPPONENT)
NO_ARMS = (*POLICIES_BESIDE_ARMS, PROXY[0])


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointResult:
    """One checkpoint of one run, with its measurements example by example.

    Attributes:
      arm: name of the arm; "sft" is the origin at step 0, "golden" the opponent of the win rate.
      loss: name of the loss in the registry.
      beta: regularisation strength; nan for a loss without one.
      learning_rate: learning rate of the run.
      seed: seed of the run; runs of one seed share SFT, golden, proxy, prompts and pairs.
      step: gradient steps taken.
      outcomes: an array of per-example values for each measured metric. Win rates and accuracy are 1, 0.5 or 0; `kl`
        and the log-ratios are nats, summed over the response; `length` is tokens.
      size: name of the policy's size, if it is not the study's own; results of different sizes are not pooled.
      steps_factor: the run's number of steps, as a multiple of the online steps.
      parameters: number of parameters of the policy; 0 if not counted.
    """

    arm: str
    loss: str
    beta: float
    learning_rate: float
    seed: int
    step: int
    outcomes: dict[str, np.ndarray]
    size: str = ""
    steps_factor: int = 1
    parameters: int = 0

    @property
    def method(self) -> Method:
        """The arm and the loss."""
        return self.arm, self.loss

    @property
    def setting(self) -> str:
        """Beta, learning rate and steps in words, the same for all runs of a setting; empty for the SFT origin."""
        settings = {"beta": self.beta, "lr": self.learning_rate}
        words = [f"{name} {value:g}" for name, value in settings.items() if not math.isnan(value)]
        return ", ".join([*words, f"{self.steps_factor}x steps"] if self.steps_factor > 1 else words)

    def mean(self, metric: str) -> float:
        """Mean of a metric over its examples; nan if it was not measured."""
        values = self.outcomes.get(metric)
        return math.nan if values is None or not len(values) else float(np.mean(values))


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison of two methods at equal KL; all gaps are first minus second, in the unit of the metric.

    Attributes:
      first: the first method.
      second: the second method.
      metric: the metric that is compared.
      seeds: the seeds in which both methods and the SFT origin were measured.
      spans: smallest and largest KL of the trained checkpoints of each method, over all seeds.
      budgets: KL to SFT in nats, ascending, over the range that both methods reach in every seed. If there is no such
        range, budgets and bands are empty, the mean gap is nan, and only the peaks can be compared.
      origin: the metric of SFT; SFT is within every budget.
      first_frontier: the best of the first method within each budget.
      second_frontier: the best of the second method within each budget.
      gap: their difference at each budget.
      mean_gap: the difference averaged over the budgets; it decides the verdict.
      peak_gap: the difference between the best at any KL.
      mean_gaps: for every seed, the mean gap (first) and its bootstrap replicates; empty without budgets.
      peak_gaps: the same for the gap between the peaks.
    """

    first: Method
    second: Method
    metric: str
    seeds: tuple[int, ...]
    spans: tuple[tuple[float, float], tuple[float, float]]
    budgets: Float[np.ndarray, "G"]
    origin: float
    first_frontier: Band
    second_frontier: Band
    gap: Band
    mean_gap: Interval
    peak_gap: Interval
    mean_gaps: tuple[Float[np.ndarray, "R"], ...]
    peak_gaps: tuple[Float[np.ndarray, "R"], ...]

    @property
    def seed_gaps(self) -> tuple[float, ...]:
        """The mean gap of every seed."""
        return tuple(float(replicates[0]) for replicates in self.mean_gaps)

    @property
    def both_at_origin(self) -> bool:
        """Whether neither method is better than SFT at any KL."""
        gaps = self.mean_gap, self.peak_gap
        frontiers = np.concatenate([self.first_frontier.value, self.second_frontier.value])
        return all(gap.low == gap.high == 0 for gap in gaps) and np.allclose(frontiers, self.origin)

    @property
    def better(self) -> str:
        """The arm that beats the other at equal KL; empty if the mean gap's interval contains 0 or does not exist."""
        if self.mean_gap.low > 0:
            return self.first[0]
        return self.second[0] if self.mean_gap.high < 0 else ""

    @property
    def verdict(self) -> str:
        """Which arm beats the other at equal KL, in words."""
        arms = self.first[0], self.second[0]
        if not len(self.budgets):
            return f"{arms[0]} and {arms[1]} cannot be compared"
        if not self.better:
            return f"no difference between {arms[0]} and {arms[1]} can be claimed"
        return f"{self.better} beats {arms[self.better == arms[0]]}"


@dataclasses.dataclass(frozen=True)
class Peak:
    """The best checkpoint of a method in one seed.

    Attributes:
      checkpoint: the checkpoint with the best mean.
      interval: its mean and interval, as for a checkpoint that was fixed beforehand. They are too high, because the
        checkpoint was chosen as the best.
      cross_fitted: the mean on prompts that did not take part in the choice, averaged over splits into halves.
    """

    checkpoint: CheckpointResult
    interval: Interval
    cross_fitted: float


# The table and the peaks.


def results_table(results: Iterable[CheckpointResult]) -> list[dict[str, object]]:
    """A row per checkpoint with `COLUMNS`: mean and interval of every metric; nan if it was not measured."""
    return [
        {name: getattr(result, name) for name in IDENTITY} | means(result.outcomes, tuple(METRICS))
        for result in results
    ]


def peaks(results: Sequence[CheckpointResult], metric: str = "win_rate") -> list[Peak]:
    """The best checkpoint of every method in every seed, in the order of the methods' first appearance."""
    found = []
    for method in methods(results):
        for seed in seeds_of(results):
            measured = [r for r in results if r.method == method and r.seed == seed and metric in r.outcomes]
            if measured:
                best = max(measured, key=lambda result: result.mean(metric))
                honest = cross_fitted_best([[checkpoint] for checkpoint in measured], metric, resamples=0)[0]
                found.append(Peak(best, mean_interval(best.outcomes[metric]), float(honest)))
    return found


def loss_name(loss: str) -> str:
    """The name of a loss in prose."""
    return LOSS_NAMES.get(loss, loss)


def methods(results: Iterable[CheckpointResult]) -> list[Method]:
    """Every arm and loss, in order of appearance."""
    return list(dict.fromkeys(result.method for result in results))


def trained_arms(results: Iterable[CheckpointResult], loss: str) -> list[str]:
    """The arms that were trained under a loss, in order of appearance."""
    return [arm for arm, of in methods(results) if of == loss and arm not in NO_ARMS]


def losses_of(results: Iterable[CheckpointResult]) -> list[str]:
    """The losses of the trained arms, IPO first."""
    losses = dict.fromkeys(loss for arm, loss in methods(results) if arm not in NO_ARMS)
    return sorted(losses, key=lambda loss: loss != "ipo")


def seeds_of(results: Iterable[CheckpointResult]) -> list[int]:
    """Every seed, ascending."""
    return sorted({result.seed for result in results})


# Equal KL.


def compare(
    results: Sequence[CheckpointResult],
    first: Method,
    second: Method,
    metric: str = "win_rate",
    *,
    points: int = 32,
    resamples: int = RESAMPLES,
) -> Comparison | None:
    """Compares two methods at equal KL to SFT, the budget of the study.

    A method's value within a budget of k nats is the best metric among its policies with KL <= k, pooled over its
    sweep. Its policies are the SFT origin, its checkpoints, and mixtures of two neighbouring checkpoints of a run. A
    mixture answers by one of them with probability 1 - t and by the other with t. It has exactly the interpolated win
    rate and, by convexity, at most the interpolated KL. Without mixtures, a run with few checkpoints would lose to a
    swept method only because of their distance.

    The gap is averaged over budgets that are equally spaced in sqrt(KL), from the larger of the two smallest KLs to the
    smaller of the two largest. Below its first checkpoint, a method has only mixtures with the origin, which give a
    lower bound. How much better it could do there was not measured, so there are no such budgets.

    The maximum over noisy checkpoints is biased upwards, and more so with more checkpoints; this would favour the swept
    method. So the maximum is cross-fitted: the best policy is chosen on one half of the prompts and measured on the
    other half. Both methods use the same halves, each half serves for both purposes, and several splits are averaged.
    All copies of a resampled prompt stay in one half. A choice from half of the prompts is a little worse than a choice
    from all.

    The KL of a checkpoint enters at its measured mean. Averaged over a few hundred prompts, its own noise is a few per
    cent. By a bootstrap of the KLs in our studies, that moves the gap of one seed by 1 to 2 points (standard
    deviation). Intervals over several seeds include it, because the KLs of each seed are measured anew; those of one
    seed do not.

    Args:
      results: checkpoints of all methods, including the SFT origin ("sft").
      first: arm and loss of the first method.
      second: arm and loss of the second method.
      metric: an outcome over the prompts; higher is better.
      points: G, the number of budgets.
      resamples: number of bootstrap samples of the prompts.

    Returns:
      The comparison over the seeds that have both methods and the origin; None if there is no such seed, or a method
      never left the origin.
    """
    both = {s: [measured_runs(results, method, s, metric) for method in (first, second)] for s in seeds_of(results)}
    paired = {seed: pair for seed, pair in both.items() if all(pair)}
    spans = [[_span(runs) for runs in pair] for pair in paired.values()]
    if not paired or not all(high > 0 for span in spans for _, high in span):
        return None
    budgets = _budgets([span for pair in spans for span in pair], points)
    frontiers = [[_frontier(runs, metric, budgets, resamples) for runs in pair] for pair in paired.values()]
    firsts, seconds = zip(*frontiers, strict=True)
    gaps = [one - other for one, other in zip(firsts, seconds, strict=True)]
    averages = [replicates[:, :-1].mean(axis=1) for replicates in gaps if len(budgets)]
    # With few seeds, Student's t can exceed the possible values of a mean, or of a difference of two means.
    low, high = (0.0, 1.0) if METRICS[metric].is_share else (-math.inf, math.inf)
    gap, none = over_groups(gaps).within(low - high, high - low), Interval(math.nan, math.nan, math.nan)
    return Comparison(
        first=first,
        second=second,
        metric=metric,
        seeds=tuple(paired),
        spans=(_hull([one for one, _ in spans]), _hull([other for _, other in spans])),
        budgets=budgets,
        origin=float(np.mean([one[0][0].mean(metric) for one, _ in paired.values()])),
        first_frontier=_budgeted(over_groups(firsts).within(low, high)),
        second_frontier=_budgeted(over_groups(seconds).within(low, high)),
        gap=_budgeted(gap),
        mean_gap=over_seeds(averages).within(low - high, high - low) if averages else none,
        peak_gap=gap.at(-1),
        mean_gaps=tuple(averages),
        peak_gaps=tuple(replicates[:, -1] for replicates in gaps),
    )


def measured_runs(results: Sequence[CheckpointResult], method: Method, seed: int, metric: str) -> Runs:
    """The runs of a method in a seed, each beginning with the SFT origin; empty if a part is missing."""
    measured = [r for r in results if r.seed == seed and metric in r.outcomes and "kl" in r.outcomes]
    origin = [result for result in measured if result.arm == ORIGIN][:1]
    runs: dict[str, list[CheckpointResult]] = {}
    for result in measured:
        if result.method == method:
            runs.setdefault(result.setting, []).append(result)
    return [origin + sorted(run, key=lambda result: result.step) for run in runs.values()] if origin else []


def _budgets(spans: Sequence[tuple[float, float]], points: int) -> Float[np.ndarray, "G"]:
    """KL budgets in nats within all spans, equally spaced in sqrt(KL); one if the spans share one point, or none."""
    start, limit = max(low for low, _ in spans), min(high for _, high in spans)
    if start >= limit:
        return np.array([limit] if start == limit else [])
    return np.linspace(math.sqrt(start), math.sqrt(limit), points) ** 2


def _hull(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in spans), max(high for _, high in spans)


def _span(runs: Runs) -> tuple[float, float]:
    """Smallest and largest KL of the trained checkpoints."""
    kl = [result.mean("kl") for run in runs for result in run[1:]]
    return min((k for k in kl if k > 0), default=0.0), max(kl)


def furthest(runs: Runs) -> CheckpointResult:
    """The checkpoint with the largest KL among all runs."""
    return max((result for run in runs for result in run), key=lambda result: result.mean("kl"))


def _budgeted(band: Band) -> Band:
    """The band without the last entry, which is the best at any KL."""
    return Band(band.value[:-1], band.low[:-1], band.high[:-1])


def _frontier(runs: Runs, metric: str, budgets: Float[np.ndarray, "G"], resamples: int) -> Float[np.ndarray, "R B"]:
    """The cross-fitted best within each budget and, last, at any KL; row 0 on the prompts, other rows on resamples."""
    mixing, kl = _policies(runs, budgets)
    ascending = np.argsort(kl, kind="stable")
    within = np.searchsorted(kl[ascending], [*budgets, np.inf], side="right") - 1
    return _cross_fitted(runs, metric, mixing[:, ascending], within, resamples)


def cross_fitted_best(runs: Runs, metric: str, resamples: int = RESAMPLES) -> Float[np.ndarray, "R"]:
    """The metric of the cross-fitted best checkpoint of all runs: on the examples (first) and on resamples."""
    checkpoints = sum(len(run) for run in runs)
    return _cross_fitted(runs, metric, np.eye(checkpoints), np.array([checkpoints - 1]), resamples)[:, 0]


def _policies(runs: Runs, budgets: Float[np.ndarray, "G"]) -> tuple[Float[np.ndarray, "C V"], Float[np.ndarray, "V"]]:
    """The C checkpoints, and the mixtures of neighbours that meet a budget, as weights of checkpoints; and their KL."""
    checkpoint_kl = np.array([result.mean("kl") for run in runs for result in run])
    weights = list(np.eye(len(checkpoint_kl)))
    kl = list(checkpoint_kl)
    starts = np.cumsum([0, *map(len, runs)])
    for start, run in zip(starts, runs, strict=False):
        for left in range(start, start + len(run) - 1):
            ends = checkpoint_kl[left], checkpoint_kl[left + 1]
            for budget in budgets[(budgets > min(ends)) & (budgets < max(ends))]:
                mixture = np.zeros(len(checkpoint_kl))
                mixture[left + 1] = (budget - ends[0]) / (ends[1] - ends[0])
                mixture[left] = 1 - mixture[left + 1]
                weights.append(mixture)
                kl.append(budget)
    return np.stack(weights, axis=1), np.array(kl)


def _cross_fitted(
    runs: Runs, metric: str, mixing: Float[np.ndarray, "C V"], within: Int[np.ndarray, "G"], resamples: int
) -> Float[np.ndarray, "R G"]:
    """Chooses the best of the first `within` + 1 policies on one half of the examples; measures it on the other."""
    checkpoints = [result for run in runs for result in run]
    outcomes, seed = _stack(checkpoints, metric), checkpoints[-1].seed
    halves = _halves(outcomes.shape[1], seed)
    ones, others = (
        resampled_part_means(outcomes, parts, seed=seed, resamples=resamples) for parts in (halves, ~halves)
    )
    total = np.zeros((len(within), resamples + 1))
    for pair in zip(ones, others, strict=True):
        sides = [mixing.T @ means for means in pair]
        for choose, measure in (sides, sides[::-1]):
            total += np.take_along_axis(measure, _running_argmax(choose)[within], axis=0)
    return total.T / (2 * _SPLITS)


def _running_argmax(values: Float[np.ndarray, "V R"]) -> Int[np.ndarray, "V R"]:
    """Index of the best value so far in each column; the earliest of equal values."""
    best, top = np.zeros(values.shape, dtype=np.int64), values[0]
    for index, row in enumerate(values[1:], start=1):  # Faster than `accumulate`, which is slow along every axis.
        best[index] = np.where(row > top, index, best[index - 1])
        top = np.maximum(row, top)
    return best


# Resampling.


@functools.lru_cache(maxsize=16)
def _halves(size: int, seed: int) -> Bool[np.ndarray, "S N"]:
    """Random halves of N examples; with a single example, it is in both halves."""
    rng = np.random.default_rng([seed, size, 1])
    return np.stack([rng.permutation(size) < size // 2 for _ in range(_SPLITS)])


def _stack(checkpoints: Sequence[CheckpointResult], metric: str) -> Float[np.ndarray, "C N"]:
    return np.stack([result.outcomes[metric] for result in checkpoints]).astype(np.float64)


def joint_means(checkpoints: Sequence[CheckpointResult], metric: str) -> Float[np.ndarray, "R C"]:
    """Means of C checkpoints of one seed, on the examples (row 0) and on joint resamples."""
    return resampled_means(_stack(checkpoints, metric), seed=checkpoints[0].seed)


def over_seeds(replicates: Sequence[Float[np.ndarray, "R"]]) -> Interval:
    """The mean of an estimate over seeds; for each seed, the estimate comes first and then its replicates."""
    return over_groups([values[:, None] for values in replicates]).at(0)
