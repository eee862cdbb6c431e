"""Bootstrap intervals: for one mean, and for contrasts between means over the same examples."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8
RESAMPLES = 1000
_TAIL = (1 - CONFIDENCE) / 2


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval, all in the unit of the estimated quantity."""

    value: float
    low: float
    high: float

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low)

    def within(self, low: float, high: float) -> Interval:
        """The interval clipped to the possible values."""
        return Interval(self.value, max(self.low, low), min(self.high, high))


@dataclasses.dataclass(frozen=True, eq=False)
class Band:
    """G estimates with the ends of their intervals; each interval alone has 95 %, not all jointly."""

    value: Float[np.ndarray, "G"]
    low: Float[np.ndarray, "G"]
    high: Float[np.ndarray, "G"]

    def at(self, index: int) -> Interval:
        """One of the estimates."""
        return Interval(float(self.value[index]), float(self.low[index]), float(self.high[index]))

    def within(self, low: float, high: float) -> Band:
        """The intervals clipped to the possible values."""
        return Band(self.value, np.maximum(self.low, low), np.minimum(self.high, high))


def mean_interval(values: Float[np.ndarray, "N"], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean of N examples with its percentile bootstrap interval.

    Equal seeds draw the same examples, so the intervals of arrays over the same prompts are paired. If all values are
    equal, the interval has width zero. This means that resampling finds no other value, not that none is possible.

    Args:
      values: one finite number for each example, in any unit.
      resamples: number of bootstrap samples.
      seed: seed of the draws.

    Returns:
      The interval in the unit of the values. With one example its ends are nan; with no example all of it is nan.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"values must be one number per example, got the shape {values.shape}")
    if values.size == 0:
        return Interval(math.nan, math.nan, math.nan)
    if values.size == 1:
        return Interval(float(values[0]), math.nan, math.nan)
    means = resampled_means(values[None], seed=seed, resamples=resamples)[:, 0]
    low, high = np.quantile(means[1:], [_TAIL, 1 - _TAIL])
    return Interval(*map(float, _rounded(np.array([means[0], low, high]))))


def resampled_means(
    outcomes: Float[np.ndarray, "C N"], *, seed: int, resamples: int = RESAMPLES
) -> Float[np.ndarray, "R C"]:
    """Means of C rows over the same N examples, and over joint bootstrap samples of these examples.

    All rows use the same draws, so differences between rows are paired. Equal seeds and sizes give equal draws.

    Args:
      outcomes: one row for each measured quantity, one column for each example; nan where it was not measured.
      seed: seed of the draws.
      resamples: number of bootstrap samples.

    Returns:
      resamples + 1 rows; row 0 has the means over the examples themselves.
    """
    everything = np.ones((1, outcomes.shape[1]), bool)
    return resampled_part_means(outcomes, everything, seed=seed, resamples=resamples)[0].T


def resampled_part_means(
    outcomes: Float[np.ndarray, "C N"], parts: Bool[np.ndarray, "P N"], *, seed: int, resamples: int = RESAMPLES
) -> Float[np.ndarray, "P C R"]:
    """Means of C rows over P parts of N examples, and over the same parts of joint bootstrap samples of all examples.

    The draws are those of `resampled_means`: the copies of a resampled example are all in a part, or all outside.

    Args:
      outcomes: one row for each measured quantity, one column for each example; nan where it was not measured.
      parts: the examples of each part. A sample without any of them (if the part is small) uses the whole part instead.
        An empty part counts as all examples.
      seed: seed of the draws.
      resamples: number of bootstrap samples.

    Returns:
      resamples + 1 means for each part and row; the first is over the part itself.
    """
    counts = _draws(outcomes.shape[1], seed, resamples)
    parts = np.where(parts.any(axis=1, keepdims=True), parts, True)
    measured, drawn = ~np.isnan(outcomes), (parts @ counts)[:, None]
    used = measured & parts[:, None]
    # One product with all parts is three times as fast as copying the counts of each part.
    sums = np.where(used, outcomes, 0.0) @ counts
    sizes = np.broadcast_to(drawn if measured.all() else used @ counts, sums.shape)
    means = np.divide(sums, sizes, out=np.full_like(sums, math.nan), where=sizes > 0)
    return np.where(drawn > 0, means, means[..., :1])


@functools.lru_cache(maxsize=16)
def _draws(size: int, seed: int, resamples: int) -> Float[np.ndarray, "N R"]:
    """How often each of N examples is drawn: once in column 0; the others are bootstrap samples of size N."""
    rng = np.random.default_rng([seed, size])
    draws = rng.multinomial(size, np.full(size, 1 / size), size=resamples)
    return np.concatenate([np.ones((1, size)), draws]).T


def over_groups(replicates: Sequence[Float[np.ndarray, "R G"]]) -> Band:
    """The mean over groups (seeds) of G estimates; each group has its own examples.

    With one group, the interval covers another draw of its examples. With S groups it covers another group as well: it
    is the wider of two intervals, the bootstrap over examples, and Student's t with S - 1 degrees of freedom on the
    groups' estimates. To resample a few groups instead would give far too narrow intervals: the variance is too small
    by the factor (S - 1) / S, and the tails are normal, while two or three groups need heavy tails.

    The bootstrap gives only the width; the interval is symmetric about the estimate. An estimate that chooses among
    noisy candidates chooses worse on a resample, which has twice the noise. So its replicates lie on one side of it.

    Args:
      replicates: for every group, the estimates (row 0) and their bootstrap replicates; nan replicates are ignored.

    Returns:
      G estimates with their intervals.
    """
    mean, half_width, error = _errors(replicates)
    if len(replicates) > 1:
        half_width = np.maximum(half_width, stats.t.ppf(1 - _TAIL, len(replicates) - 1) * error)
    value, half_width = _rounded(mean), _rounded(half_width)
    return Band(value, value - half_width, value + half_width)


class Spread(NamedTuple):
    """A mean over groups with its two standard errors; the one with the wider interval counts, as in `over_groups`.

    Attributes:
      value: the mean, in the unit of the estimated quantity.
      examples: standard error from the draw of each group's examples.
      between: standard error from the choice of groups; 0 with one group.
      groups: number of groups.
    """

    value: float
    examples: float
    between: float
    groups: int

    @property
    def interval(self) -> Interval:
        """The 95 % interval, the same as from `over_groups`."""
        half_width = self._quantile(1 - _TAIL)
        return Interval(self.value, self.value - half_width, self.value + half_width)

    @property
    def detectable(self) -> float:
        """The distance from a limit at which the interval excludes this limit with a probability of 80 %.

        This is an estimate too, because the standard errors are.
        """
        of_examples = self.examples * (stats.norm.ppf(1 - _TAIL) + stats.norm.ppf(POWER))
        return max(of_examples, self.between * _detectable_errors(self._freedom))

    def p_value(self, limit: float) -> float:
        """1 - the largest confidence whose two-sided interval excludes a limit; below 0.05 if `interval` does."""
        distance = abs(self.value - limit)
        if distance == 0:
            return 1.0
        tails = [0.0]
        if self.examples > 0:
            tails.append(float(stats.norm.sf(distance / self.examples)))
        if self.between > 0:
            tails.append(float(stats.t.sf(distance / self.between, self._freedom)))
        return 2 * max(tails)

    @property
    def _freedom(self) -> int:
        return max(self.groups - 1, 1)

    def _quantile(self, probability: float) -> float:
        return max(self.examples * stats.norm.ppf(probability), self.between * stats.t.ppf(probability, self._freedom))


@functools.cache
def _detectable_errors(freedom: int) -> float:
    """The noncentrality of Student's t at which a two-sided test of 5 % rejects with a probability of 80 %."""
    limit = stats.t.ppf(1 - _TAIL, freedom)
    return optimize.brentq(lambda distance: stats.nct.sf(limit, freedom, distance) - POWER, 0.0, 100.0)


def spread_over_groups(replicates: Sequence[Float[np.ndarray, "R"]]) -> Spread:
    """The mean over groups (seeds) of one estimate; each group gives the estimate (first) and its replicates."""
    mean, half_width, error = map(_rounded, _errors([each[:, None] for each in replicates]))
    examples = float(half_width[0]) / float(stats.norm.ppf(1 - _TAIL))
    return Spread(float(mean[0]), examples, float(error[0]), len(replicates))


def unseen_share(examples: int) -> float:
    """The largest fraction of other examples that N equal examples leave possible at 95 %: 1 - 0.05^(1/N), about 3/N.

    This is the "rule of three". Resampling N equal examples finds no spread.
    """
    return 1 - (1 - CONFIDENCE) ** (1 / examples)


def _errors(replicates: Sequence[Float[np.ndarray, "R G"]]) -> tuple[Float[np.ndarray, "G"], ...]:
    """Means over the groups, the half widths of their bootstrap intervals, and the standard errors between groups."""
    stacked = np.stack(replicates)
    mean = stacked.mean(axis=0)
    low, high = np.nanquantile(mean[1:], [_TAIL, 1 - _TAIL], axis=0)
    groups = len(stacked)
    error = stacked[:, 0].std(axis=0, ddof=1) / math.sqrt(groups) if groups > 1 else np.zeros_like(mean[0])
    return mean[0], (high - low) / 2, error


def _rounded(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Without the last bits, in which equal means may differ by the order of their sums, and without a zero's sign."""
    return np.round(values, 12) + 0.0
