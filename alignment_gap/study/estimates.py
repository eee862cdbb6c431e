"""The estimates behind claims: a number for every seed, with bootstrap replicates, computed from the checkpoints.

An estimate is a frozen value that is called with the `Evidence` of a study. It returns an array for each seed: the
first entry is the estimate on the examples, and the others are estimates on resamples. If the study lacks a
measurement, it raises `NotMeasured` with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from scipy import stats

from alignment_gap.evaluation.intervals import RESAMPLES
from alignment_gap.study.analysis import (
    METRICS,
    ORIGIN,
    PROXY,
    CheckpointResult,
    Comparison,
    Method,
    Runs,
    compare,
    cross_fitted_best,
    furthest,
    joint_means,
    loss_name,
    measured_runs,
    seeds_of,
)

NARROW = 1.1
"""The minimum ratio of the largest to the smallest shared budget; a narrower range of KL is not enough for a claim."""
FEWEST_RUNS = 3
"""The minimum number of runs in a seed for a correlation of two metrics."""
CORRELATION = "correlation"
"""The unit of an estimate that is not a metric."""

BySeed = dict[int, Float[np.ndarray, "R"]]


class NotMeasured(Exception):
    """The study lacks something that an estimate needs; the message says what."""


class Evidence:
    """The checkpoints of a study; caches the comparisons at equal KL, which several claims and figures may read."""

    def __init__(self, results: Sequence[CheckpointResult]) -> None:
        """Takes the checkpoints of all policies; estimates use those of the study's own size."""
        self.everything = results
        self.results = [result for result in results if not result.size]
        self.compared = functools.cache(self._compare)
        self.with_shared_settings = functools.cache(self._with_shared_settings)

    @functools.cached_property
    def seeds(self) -> list[int]:
        """Every seed, ascending."""
        return seeds_of(self.results)

    @functools.cached_property
    def parameters(self) -> int:
        """Number of parameters of the study's own policies; 0 if not counted."""
        return max((result.parameters for result in self.results if result.arm == ORIGIN), default=0)

    @functools.cached_property
    def sizes(self) -> dict[str, Evidence]:
        """Separate evidence for every size by name, including the study's own, ordered by number of parameters."""
        names = dict.fromkeys(result.size for result in self.everything if result.arm == ORIGIN)
        return dict(sorted(((name, self._of_size(name)) for name in names), key=lambda each: each[1].parameters))

    def runs(self, method: Method, metric: str) -> dict[int, Runs]:
        """The runs of a method in every seed that measured the metric and KL; raises NotMeasured if there is none."""
        runs = {seed: measured_runs(self.results, method, seed, metric) for seed in self.seeds}
        found = {seed: each for seed, each in runs.items() if each}
        if not found:
            raise NotMeasured(f"{in_words(method)} was not trained, or its {METRICS[metric].words} was not measured")
        return found

    def examples(self, metric: str, seeds: Sequence[int]) -> int:
        """The number of examples of a metric in several seeds; in each, that of the checkpoint with the fewest."""
        measured = [result for result in self.everything if metric in result.outcomes]
        return sum(min(len(result.outcomes[metric]) for result in measured if result.seed == seed) for seed in seeds)

    def ends(self, method: Method, metric: str) -> dict[int, list[CheckpointResult]]:
        """The last checkpoint of every run of a method, by seed; raises NotMeasured if there is none."""
        measured = [result for result in self.results if result.method == method and metric in result.outcomes]
        if not measured:
            raise NotMeasured(f"{in_words(method)} was not trained, or its {METRICS[metric].words} was not measured")
        last = {(r.seed, r.setting): r for r in sorted(measured, key=lambda result: result.step)}
        ends: dict[int, list[CheckpointResult]] = {}
        for (seed, _), result in last.items():
            ends.setdefault(seed, []).append(result)
        return ends

    def _with_shared_settings(self, first: Method, second: Method) -> Evidence:
        """The evidence with only those runs of two methods whose settings both have; raises NotMeasured without any."""
        settings = [{r.setting for r in self.results if r.method == method} for method in (first, second)]
        shared = settings[0] & settings[1]
        if not shared:
            raise NotMeasured(f"{in_words(first)} and {in_words(second)} were trained at no setting that both have")
        return Evidence([r for r in self.results if r.method not in (first, second) or r.setting in shared])

    def _compare(self, first: Method, second: Method, metric: str = "win_rate") -> Comparison | None:
        return compare(self.results, first, second, metric)

    def _of_size(self, size: str) -> Evidence:
        chosen = (result for result in self.everything if result.size == size)
        return Evidence([dataclasses.replace(result, size="") for result in chosen])


@dataclasses.dataclass(frozen=True)
class EqualKl:
    """The gap at equal KL, first minus second, averaged over the budgets that both methods reach.

    With `at_shared_settings`, only runs at settings that both methods have count, because a sweep has more tries than
    one run.
    """

    first: Method
    second: Method
    metric: str = "win_rate"
    at_shared_settings: bool = False
    is_gap: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if a method is missing, both share no wide range of KL, or neither beats SFT."""
        for method in (self.first, self.second):
            evidence.runs(method, self.metric)  # Raises if there are no runs at any setting.
        if self.at_shared_settings:
            evidence = evidence.with_shared_settings(self.first, self.second)
        comparison = _comparison(evidence, self.first, self.second, self.metric)
        budgets = comparison.budgets
        if not len(budgets):
            raise NotMeasured(f"{in_words(self.first)} and {in_words(self.second)} share no range of KL")
        if budgets[-1] < NARROW * budgets[0]:
            raise NotMeasured(f"{in_words(self.first)} and {in_words(self.second)} share a narrow range of KL only")
        if comparison.both_at_origin:  # They are equally good, whatever they do to the policy.
            raise NotMeasured(f"neither {in_words(self.first)} nor {in_words(self.second)} beats SFT")
        return dict(zip(comparison.seeds, comparison.mean_gaps, strict=True))

    def __str__(self) -> str:
        shared = " and settings" if self.at_shared_settings else ""
        return f"{_minus(self.first, self.second)}, {METRICS[self.metric].words}, at equal KL{shared}"


@dataclasses.dataclass(frozen=True)
class PeakGap:
    """The gap between the best of two methods at any KL, first minus second, cross-fitted.

    With `at_shared_settings`, only runs at settings that both methods have count.
    """

    first: Method
    second: Method
    metric: str = "win_rate"
    at_shared_settings: bool = False
    is_gap: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if a method is missing."""
        if self.at_shared_settings:
            evidence = evidence.with_shared_settings(self.first, self.second)
        comparison = _comparison(evidence, self.first, self.second, self.metric)
        return dict(zip(comparison.seeds, comparison.peak_gaps, strict=True))

    def __str__(self) -> str:
        shared = " at shared settings" if self.at_shared_settings else ""
        return f"{_minus(self.first, self.second)}, {METRICS[self.metric].words}, peak{shared}"


@dataclasses.dataclass(frozen=True)
class Rise:
    """The cross-fitted best of a method minus SFT."""

    method: Method
    metric: str = "win_rate"
    is_gap: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if the method is missing."""
        return _best_minus(lambda runs: runs[0][0], evidence.runs(self.method, self.metric), self.metric)

    def __str__(self) -> str:
        return f"{in_words(self.method)}, {METRICS[self.metric].words}, peak minus SFT"


@dataclasses.dataclass(frozen=True)
class Fall:
    """The cross-fitted best of a method minus its checkpoint of the largest KL."""

    method: Method
    metric: str = "win_rate"
    is_gap: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if the method is missing."""
        return _best_minus(furthest, evidence.runs(self.method, self.metric), self.metric)

    def __str__(self) -> str:
        return f"{in_words(self.method)}, {METRICS[self.metric].words}, peak minus largest KL"


@dataclasses.dataclass(frozen=True)
class AtEnd:
    """A metric at the end of training: the mean over a method's runs, and the maximum over methods.

    With `settings_of`, only runs at settings that this method has too count: the runs of a sweep may lie on both sides
    of a value that their mean has.
    """

    methods: tuple[Method, ...]
    metric: str
    settings_of: Method | None = None
    is_gap: ClassVar[bool] = False

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if one of the methods is missing, or has no run at these settings."""
        for method in self.methods:
            evidence.ends(method, self.metric)  # Raises if it was not measured at any setting.
            if self.settings_of is not None:
                evidence = evidence.with_shared_settings(method, self.settings_of)
        ends = [evidence.ends(method, self.metric) for method in self.methods]
        shared = [seed for seed in ends[0] if all(seed in each for each in ends)]
        return {seed: np.max([_mean(each[seed], self.metric) for each in ends], axis=0) for seed in _some(shared)}

    def __str__(self) -> str:
        names = ", ".join(map(in_words, self.methods))
        largest = f"largest of {names}" if len(self.methods) > 1 else names
        at = f" at settings of {in_words(self.settings_of)}" if self.settings_of else ""
        return f"{largest}, {METRICS[self.metric].words}, end of training{at}"


@dataclasses.dataclass(frozen=True)
class EndGap:
    """A metric at the end of training, first minus second; the second method's runs at the settings of the first count.

    If the second method has no run at a setting of the first, all its runs count.
    """

    first: Method
    second: Method
    metric: str
    is_gap: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if a method is missing."""
        firsts, seconds = (evidence.ends(method, self.metric) for method in (self.first, self.second))
        gaps = {}
        for seed in _some([seed for seed in firsts if seed in seconds]):
            settings = {result.setting for result in firsts[seed]}
            matched = [result for result in seconds[seed] if result.setting in settings] or seconds[seed]
            gaps[seed] = _mean(firsts[seed], self.metric) - _mean(matched, self.metric)
        return gaps

    def __str__(self) -> str:
        return f"{_minus(self.first, self.second)}, {METRICS[self.metric].words}, end of training"


@dataclasses.dataclass(frozen=True)
class ProxyLead:
    """How much better the proxy classifies pairs than the best run of several methods at the end of training.

    The best run is chosen on one half of the pairs and measured on the other, because the best of many on the same
    pairs is too good.
    """

    methods: tuple[Method, ...]
    metric: str
    is_gap: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if the proxy or one of the methods is missing."""
        ends = [evidence.ends(method, self.metric) for method in (PROXY, *self.methods)]
        gaps = {}
        for seed in _some([seed for seed in ends[0] if all(seed in each for each in ends)]):
            proxy, *policies = (each[seed] for each in ends)
            runs = [[result] for results in policies for result in results]
            gaps[seed] = _mean(proxy, self.metric) - cross_fitted_best(runs, self.metric)
        return gaps

    def __str__(self) -> str:
        names = ", ".join(map(in_words, self.methods))
        return f"proxy minus the best run of {names}, {METRICS[self.metric].words}"


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Spearman's correlation of two metrics over the checkpoints of a method's runs.

    The checkpoints of a run are not independent, so whole runs are resampled instead of examples.
    """

    method: Method
    predictor: str
    predicted: str
    metric: ClassVar[str] = CORRELATION
    is_gap: ClassVar[bool] = False

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if there are too few runs, or all have the same results."""
        found = {}
        for seed, runs in evidence.runs(self.method, self.predicted).items():
            both = [run for run in runs if all(self.predictor in result.outcomes for result in run[1:])]
            if len(both) >= FEWEST_RUNS:
                found[seed] = self._resampled(both, seed)
        if not found or any(math.isnan(values[0]) for values in found.values()):
            raise NotMeasured(f"{in_words(self.method)} has fewer than {FEWEST_RUNS} runs of differing results a seed")
        return found

    def _resampled(self, runs: Runs, seed: int) -> Float[np.ndarray, "R"]:
        points = [np.array([[r.mean(self.predictor), r.mean(self.predicted)] for r in run[1:]]) for run in runs]
        rng = np.random.default_rng([seed, len(runs)])
        draws = [np.arange(len(runs)), *rng.integers(len(runs), size=(RESAMPLES, len(runs)))]
        return np.array([_spearman(np.concatenate([points[run] for run in draw])) for draw in draws])

    def __str__(self) -> str:
        names = (METRICS[name].words for name in (self.predictor, self.predicted))
        return f"{in_words(self.method)}, Spearman's correlation of {' and '.join(names)}"


@dataclasses.dataclass(frozen=True)
class Narrowing:
    """How much smaller the gap between the peaks is at the largest size than at the smallest.

    Only runs at settings that both methods have count: a sweep has more tries, and what they gain depends on the size.
    """

    first: Method
    second: Method
    metric: str = "win_rate"
    is_gap: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if there is only one size, or a method is missing at one of the two."""
        gap = PeakGap(self.first, self.second, self.metric, at_shared_settings=True)
        sizes = [*evidence.sizes.values()]
        if len(sizes) < 2:
            raise NotMeasured("the study has policies of one size")
        smallest, largest = gap(sizes[0]), gap(sizes[-1])
        return {seed: smallest[seed] - largest[seed] for seed in _some([seed for seed in smallest if seed in largest])}

    def __str__(self) -> str:
        minus = _minus(self.first, self.second)
        return f"{minus}, {METRICS[self.metric].words}, peak at shared settings, smallest minus largest size"


@dataclasses.dataclass(frozen=True)
class Difference:
    """One estimate minus another with the same metric, in the seeds that have both."""

    one: Narrowing
    other: Narrowing
    is_gap: ClassVar[bool] = True

    @property
    def metric(self) -> str:
        """The metric of both."""
        return self.one.metric

    def __call__(self, evidence: Evidence) -> BySeed:
        """Raises NotMeasured if one of them does."""
        one, other = self.one(evidence), self.other(evidence)
        return {seed: one[seed] - other[seed] for seed in _some([seed for seed in one if seed in other])}

    def __str__(self) -> str:
        return f"({self.one}) minus ({self.other})"


Estimate = EqualKl | PeakGap | Rise | Fall | AtEnd | EndGap | ProxyLead | Correlation | Narrowing | Difference


def bounds(estimate: Estimate) -> tuple[float, float]:
    """The range of possible values of an estimate; with few seeds, Student's t can exceed it."""
    if estimate.metric == CORRELATION:
        return -1.0, 1.0
    if not METRICS[estimate.metric].is_share:
        return -math.inf, math.inf
    return (-1.0, 1.0) if estimate.is_gap else (0.0, 1.0)


def in_words(method: Method) -> str:
    """The name of a method in the report: arm and loss."""
    arm, loss = method
    return arm if method == PROXY else f"{arm} {loss_name(loss)}"


def _minus(first: Method, second: Method) -> str:
    if first[1] == second[1]:
        return f"{loss_name(first[1])}: {first[0]} minus {second[0]}"
    return f"{in_words(first)} minus {in_words(second)}"


def _comparison(evidence: Evidence, first: Method, second: Method, metric: str) -> Comparison:
    one, other = (evidence.runs(method, metric) for method in (first, second))
    comparison = evidence.compared(first, second, metric)
    if comparison is None:
        why = "did not both leave SFT" if one.keys() & other.keys() else "were not measured in one seed"
        raise NotMeasured(f"{in_words(first)} and {in_words(second)} {why}")
    return comparison


def _best_minus(chosen: Callable[[Runs], CheckpointResult], runs: dict[int, Runs], metric: str) -> BySeed:
    """The cross-fitted best of the runs minus one of their checkpoints, by seed."""
    return {seed: cross_fitted_best(each, metric) - _mean([chosen(each)], metric) for seed, each in runs.items()}


def _some(seeds: list[int]) -> list[int]:
    if not seeds:
        raise NotMeasured("no seed has all that is compared")
    return seeds


def _mean(checkpoints: Sequence[CheckpointResult], metric: str) -> Float[np.ndarray, "R"]:
    return joint_means(checkpoints, metric).mean(axis=1)


def _spearman(points: Float[np.ndarray, "P 2"]) -> float:
    ranks = stats.rankdata(points, axis=0)
    ranks -= ranks.mean(axis=0)
    scale = math.sqrt(float((ranks[:, 0] ** 2).sum() * (ranks[:, 1] ** 2).sum()))
    return float(ranks[:, 0] @ ranks[:, 1]) / scale if scale else math.nan
