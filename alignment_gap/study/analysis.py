"""What the numbers of a study say: the table of results, the peaks, and whether one source beats another at equal KL.

Everything is computed from `CheckpointResult`s, plain numpy arrays with one entry per example. The examples of one
seed are the same, in the same order, for all its checkpoints, so every contrast is paired: one resampling of the
examples is applied to all checkpoints at once, and what they share cancels.

One seed gives intervals that cover another draw of prompts, not another training run. Several seeds give intervals
that cover another seed: the wider of the bootstrap over prompts and Student's t over the seeds' estimates. A
bootstrap of the seeds themselves is not used, since over two to five of them it is far too narrow.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from alignment_gap.evaluation.intervals import RESAMPLES, Band, Interval, mean_interval, over_groups, resampled_means

Method = tuple[str, str]
"""An arm and a loss; its runs over a sweep are pooled."""

Runs = list[list["CheckpointResult"]]
"""The runs of one method in one seed, each a list of checkpoints by step."""

Agreement = Literal["agrees", "disagrees", "cannot be told", "not in the paper"]

ORIGIN = "sft"
IDENTITY = ("arm", "loss", "beta", "learning_rate", "seed", "step")
METRICS = (
    "kl",
    "win_rate",
    "win_rate_sft",
    "proxy_win_rate",
    "rubric",
    "accuracy",
    "chosen_log_ratio",
    "rejected_log_ratio",
    "length",
)
COLUMNS = (
    *IDENTITY,
    "kl",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    *(metric for metric in METRICS if metric not in ("kl", "win_rate")),
    *(f"{metric}_{end}" for metric in METRICS if metric != "win_rate" for end in ("low", "high")),
)
LOSS_NAMES = {"ipo": "IPO", "dpo": "DPO", "best_of_n": "Best-of-n", "sft": "SFT"}
METRIC_NAMES = {
    "win_rate": "win rate against the golden policy",
    "win_rate_sft": "win rate against SFT",
    "proxy_win_rate": "win rate by the proxy",
    "rubric": "rubric score",
    "accuracy": "accuracy on D_golden",
}
PROPORTIONS = frozenset({"win_rate", "win_rate_sft", "proxy_win_rate", "accuracy"})
_FORMS: dict[str, tuple[int, str, str]] = {
    **dict.fromkeys(PROPORTIONS, (100, ".1f", " points")),
    "nats": (1, ".3g", " nats"),
    "rubric": (1, ".3f", ""),
}
"""How a change is written: its scale, its digits, its unit."""
CHANCE = 0.55
"""The paper's "around or below 50 %": an accuracy up to this counts as chance."""
MARGIN = 0.03
"""Win rates closer than this at equal KL count as level with the paper's "about as good" and "hardly beats"."""
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
_SPLITS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class CheckpointResult:
    """One checkpoint of one run and what was measured on it, example by example.

    Attributes:
      arm: where the pairs came from: "sft" is the origin at step 0, "golden" the opponent of the win rate.
      loss: name of the loss in the registry.
      beta: regularisation strength, nan for a loss without one.
      learning_rate: of the run.
      seed: of the run; runs of one seed share SFT, golden, proxy, prompts and pairs.
      step: gradient steps taken.
      outcomes: an array of per-example values for each metric; a metric that was not measured is absent. Win rates
        and accuracy are 1, 0.5 or 0, `kl` and the log ratios are nats summed over the response, `length` is tokens.
    """

    arm: str
    loss: str
    beta: float
    learning_rate: float
    seed: int
    step: int
    outcomes: dict[str, np.ndarray]

    @property
    def method(self) -> Method:
        """The arm and the loss."""
        return self.arm, self.loss

    @property
    def setting(self) -> str:
        """Beta and learning rate in words, equal for the runs of one setting (a nan is unequal to itself)."""
        beta = "" if math.isnan(self.beta) else f"beta {self.beta:g}, "
        return f"{beta}lr {self.learning_rate:g}"

    def mean(self, metric: str) -> float:
        """Mean of a metric over its examples, nan where it was not measured."""
        values = self.outcomes.get(metric)
        return math.nan if values is None or not len(values) else float(np.mean(values))


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Two methods at equal KL; all gaps are first minus second, in the unit of the metric.

    Attributes:
      first: one method.
      second: the other.
      metric: what is compared.
      seeds: those in which both methods and the SFT origin were measured.
      budgets: KL to SFT in nats, ascending, over the range that both methods reach.
      first_frontier: the best of the first method within each budget.
      second_frontier: the best of the second method within each budget.
      gap: their difference at each budget.
      mean_gap: the difference averaged over the budgets; the verdict rests on it.
      peak_gap: the difference of the best at any KL.
      seed_gaps: the mean gap of every seed.
    """

    first: Method
    second: Method
    metric: str
    seeds: tuple[int, ...]
    budgets: Float[np.ndarray, "G"]
    first_frontier: Band
    second_frontier: Band
    gap: Band
    mean_gap: Interval
    peak_gap: Interval
    seed_gaps: tuple[float, ...]

    @property
    def better(self) -> str:
        """The arm that beats the other at equal KL; empty where the interval of the mean gap holds 0."""
        if self.mean_gap.low > 0:
            return self.first[0]
        return self.second[0] if self.mean_gap.high < 0 else ""

    @property
    def verdict(self) -> str:
        """Which of the two beats the other at equal KL, in words."""
        arms = self.first[0], self.second[0]
        if not self.better:
            return f"no difference between {arms[0]} and {arms[1]} can be claimed"
        return f"{self.better} beats {arms[self.better == arms[0]]}"


@dataclasses.dataclass(frozen=True)
class Peak:
    """The best checkpoint of a method in one seed.

    Attributes:
      checkpoint: the one with the best mean.
      interval: its mean with the interval of a checkpoint that was fixed beforehand: too high after a choice.
      cross_fitted: the mean on prompts that had no part in the choice, averaged over splits into halves.
    """

    checkpoint: CheckpointResult
    interval: Interval
    cross_fitted: float


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence computed from the numbers, and whether they agree with the paper's."""

    sentence: str
    agreement: Agreement


# The table and the peaks.


def results_table(results: Iterable[CheckpointResult], seed: int = 0) -> list[dict[str, object]]:
    """A row per checkpoint with `COLUMNS`: the mean and the interval of every metric, nan where it was not measured."""
    rows = []
    for result in results:
        row: dict[str, object] = {name: getattr(result, name) for name in IDENTITY}
        for metric in METRICS:
            interval = mean_interval(result.outcomes.get(metric, np.array([])), seed=seed)
            row |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        rows.append({column: row[column] for column in COLUMNS})
    return rows


def csv_text(rows: Iterable[dict[str, object]]) -> str:
    """The rows of `results_table` as CSV with a header; a nan is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if _is_nan(value) else value for name, value in row.items()})
    return text.getvalue()


def write_csv(path: str | os.PathLike[str], rows: Iterable[dict[str, object]]) -> None:
    """Writes `csv_text` to a file."""
    pathlib.Path(path).write_text(csv_text(rows), encoding="utf-8")


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def peaks(results: Sequence[CheckpointResult], metric: str = "win_rate") -> list[Peak]:
    """The best checkpoint of every method in every seed, in the order in which the methods appear."""
    found = []
    for method in methods(results):
        for seed in _seeds(results):
            measured = [r for r in results if r.method == method and r.seed == seed and metric in r.outcomes]
            if measured:
                best = max(measured, key=lambda result: result.mean(metric))
                honest = _best([[checkpoint] for checkpoint in measured], metric, resamples=0)[0]
                found.append(Peak(best, mean_interval(best.outcomes[metric]), float(honest)))
    return found


def loss_name(loss: str) -> str:
    """The loss as it is written in prose."""
    return LOSS_NAMES.get(loss, loss)


def methods(results: Iterable[CheckpointResult]) -> list[Method]:
    """Every arm and loss, in order of appearance."""
    return list(dict.fromkeys(result.method for result in results))


def _seeds(results: Iterable[CheckpointResult]) -> list[int]:
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

    What a method can reach within a budget of k nats is the best metric among its policies with KL <= k, pooled over
    its sweep. Its policies are the SFT origin, its checkpoints, and the mixtures of two neighbouring checkpoints of a
    run: a policy that answers by one of them with probability 1 - t and by the other with t has exactly the
    interpolated win rate, and by convexity at most the interpolated KL. Without the mixtures a run with few
    checkpoints would lose to a swept one by its spacing alone. The gap is taken at budgets equally spaced in
    sqrt(KL) where both methods have checkpoints, from the larger of their smallest KLs to the smaller of their
    largest, and averaged over them.

    The maximum over noisy checkpoints is biased upwards, the more the more there are, which would favour the swept
    method. So it is cross-fitted: the best policy is chosen on one half of the prompts and measured on the other, the
    same halves for both methods, both ways round, averaged over several splits. All copies of a resampled prompt stay
    in one half. What remains is that a choice from half of the prompts is a little worse than one from all.

    The KL of a checkpoint enters at its measured mean. Its own noise, a few per cent, shifts a frontier sideways by
    as much, which moves a win rate by well under a point where the KL is averaged over a few hundred prompts.

    Args:
      results: checkpoints of all methods, the SFT origin ("sft") among them.
      first: arm and loss.
      second: arm and loss.
      metric: an outcome over the prompts, higher better.
      points: number of budgets G.
      resamples: bootstrap samples of the prompts.

    Returns:
      The comparison over the seeds that have both methods and the origin, or None where there are none.
    """
    both = {seed: [_runs(results, method, seed, metric) for method in (first, second)] for seed in _seeds(results)}
    paired = {seed: pair for seed, pair in both.items() if all(pair)}
    budgets = _budgets([runs for pair in paired.values() for runs in pair], points)
    if not len(budgets):
        return None
    firsts = [_frontier(runs, metric, budgets, resamples) for runs, _ in paired.values()]
    seconds = [_frontier(runs, metric, budgets, resamples) for _, runs in paired.values()]
    gaps = [one - other for one, other in zip(firsts, seconds, strict=True)]
    gap = over_groups(gaps)
    return Comparison(
        first=first,
        second=second,
        metric=metric,
        seeds=tuple(paired),
        budgets=budgets,
        first_frontier=_budgeted(over_groups(firsts)).within(*_range(metric)),
        second_frontier=_budgeted(over_groups(seconds)).within(*_range(metric)),
        gap=_budgeted(gap),
        mean_gap=over_groups([replicates[:, :-1].mean(axis=1, keepdims=True) for replicates in gaps]).at(0),
        peak_gap=gap.at(-1),
        seed_gaps=tuple(float(replicates[0, :-1].mean()) for replicates in gaps),
    )


def _runs(results: Sequence[CheckpointResult], method: Method, seed: int, metric: str) -> Runs:
    """The runs of a method in a seed, each from the SFT origin on; none where a part is missing."""
    measured = [r for r in results if r.seed == seed and metric in r.outcomes and "kl" in r.outcomes]
    origin = [result for result in measured if result.arm == ORIGIN][:1]
    runs: dict[str, list[CheckpointResult]] = {}
    for result in measured:
        if result.method == method:
            runs.setdefault(result.setting, []).append(result)
    return [origin + sorted(run, key=lambda result: result.step) for run in runs.values()] if origin else []


def _budgets(methods_runs: Sequence[Runs], points: int) -> Float[np.ndarray, "G"]:
    """KL budgets in nats, equally spaced in the root, that all methods reach; none where none trained beyond 0."""
    spans = [_span(runs) for runs in methods_runs]
    limit = min((high for _, high in spans), default=0.0)
    if not limit > 0:
        return np.array([])
    start = min(limit, max(low for low, _ in spans))
    return np.linspace(math.sqrt(start), math.sqrt(limit), points) ** 2


def _span(runs: Runs) -> tuple[float, float]:
    """Smallest and largest KL of the trained checkpoints."""
    kl = [result.mean("kl") for run in runs for result in run[1:]]
    return min((k for k in kl if k > 0), default=0.0), max(kl)


def _furthest(runs: Runs) -> CheckpointResult:
    return max((result for run in runs for result in run), key=lambda result: result.mean("kl"))


def _range(metric: str) -> tuple[float, float]:
    """The values that a mean can take."""
    return (0.0, 1.0) if metric in PROPORTIONS else (-math.inf, math.inf)


def _budgeted(band: Band) -> Band:
    """Leaves out the last entry, the best at any KL."""
    return Band(band.value[:-1], band.low[:-1], band.high[:-1])


def _frontier(runs: Runs, metric: str, budgets: Float[np.ndarray, "G"], resamples: int) -> Float[np.ndarray, "R G+1"]:
    """The cross-fitted best within each budget and, last, at any KL; row 0 on the prompts, the others on resamples."""
    mixing, kl = _policies(runs, budgets)
    ascending = np.argsort(kl, kind="stable")
    within = np.searchsorted(kl[ascending], [*budgets, np.inf], side="right") - 1
    return _cross_fitted(runs, metric, mixing[:, ascending], within, resamples)


def _best(runs: Runs, metric: str, resamples: int = RESAMPLES) -> Float[np.ndarray, "R"]:
    """The cross-fitted best checkpoint of all runs."""
    checkpoints = sum(len(run) for run in runs)
    return _cross_fitted(runs, metric, np.eye(checkpoints), np.array([checkpoints - 1]), resamples)[:, 0]


def _policies(runs: Runs, budgets: Float[np.ndarray, "G"]) -> tuple[Float[np.ndarray, "C V"], Float[np.ndarray, "V"]]:
    """The C checkpoints and the mixtures of neighbours that meet a budget, as weights of checkpoints, and their KL."""
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
    """Chooses the best of the first `within` + 1 policies on one half of the examples, measures it on the other."""
    checkpoints = [result for run in runs for result in run]
    outcomes = _stack(checkpoints, metric)
    seed = checkpoints[-1].seed
    total = np.zeros((resamples + 1, len(within)))
    for half in _halves(outcomes.shape[1], seed):
        sides = [
            resampled_means(outcomes, seed=seed, resamples=resamples, part=part) @ mixing for part in (half, ~half)
        ]
        for choose, measure in (sides, sides[::-1]):
            total += np.take_along_axis(measure, _running_argmax(choose)[:, within], axis=1)
    return total / (2 * _SPLITS)


def _running_argmax(values: Float[np.ndarray, "R V"]) -> Int[np.ndarray, "R V"]:
    """Index of the best value so far in each row, the earliest of equals."""
    best = np.maximum.accumulate(values, axis=1)
    before = np.concatenate([np.full((len(values), 1), -np.inf), best[:, :-1]], axis=1)
    return np.maximum.accumulate(np.where(values > before, np.arange(values.shape[1]), 0), axis=1)


# Resampling.


@functools.lru_cache(maxsize=16)
def _halves(size: int, seed: int) -> Bool[np.ndarray, "S N"]:
    """Random halves of N examples; of a single example both halves are the whole."""
    rng = np.random.default_rng([seed, size, 1])
    return np.stack([rng.permutation(size) < size // 2 for _ in range(_SPLITS)])


def _stack(checkpoints: Sequence[CheckpointResult], metric: str) -> Float[np.ndarray, "C N"]:
    return np.stack([result.outcomes[metric] for result in checkpoints]).astype(np.float64)


def _replicates(checkpoints: Sequence[CheckpointResult], metric: str) -> Float[np.ndarray, "R C"]:
    """Means of C checkpoints of one seed on the examples (row 0) and on joint resamples of them."""
    return resampled_means(_stack(checkpoints, metric), seed=checkpoints[0].seed)


def _interval(replicates: Sequence[Float[np.ndarray, "R"]]) -> Interval:
    return over_groups([values[:, None] for values in replicates]).at(0)


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
    return f"{loss_name(comparison.first[1])}: at equal KL {comparison.verdict}."


def equal_kl_detail(comparison: Comparison) -> str:
    """The size of the gap: averaged over the budgets, and between the peaks."""
    first, second = comparison.first[0], comparison.second[0]
    metric = METRIC_NAMES.get(comparison.metric, comparison.metric)
    low, high = comparison.budgets[[0, -1]]
    return (
        f"Averaged over budgets of {low:.2g} to {high:.2g} nats the gap in {metric}, {first} minus {second}, is "
        f"{in_words(comparison.mean_gap, comparison.metric)}; between their peaks, at any KL, it is "
        f"{in_words(comparison.peak_gap, comparison.metric)}."
    )


def seed_gaps_sentence(comparison: Comparison) -> str:
    """The mean gap of each of several seeds; empty for one."""
    if len(comparison.seeds) == 1:
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
    """
    mean, peak = comparison.mean_gap, comparison.peak_gap
    pair = comparison.first[0], comparison.second[0], comparison.first[1]
    expected = _EXPECTED.get(pair) if comparison.metric == "win_rate" else None
    agreement: Agreement = "cannot be told"
    if expected is None:
        agreement = "not in the paper"
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
    """The paper: both branches rise, then fall with KL. The fall is from the cross-fitted best to the largest KL."""
    parts, falls = [], []
    for method in chosen:
        seeded = [runs for seed in _seeds(results) if (runs := _runs(results, method, seed, metric))]
        if not seeded:
            continue
        last = [_furthest(runs) for runs in seeded]
        fall = _interval(
            [_best(runs, metric) - _replicates([end], metric)[:, 0] for runs, end in zip(seeded, last, strict=True)]
        )
        kl = np.mean([end.mean("kl") for end in last])
        falls.append(fall.low > 0)
        reading = "" if fall.low > 0 else ", no fall that can be claimed"
        parts.append(f"{method[0]} {in_words(-fall, metric)} at {kl:.2g} nats{reading}")
    if not parts:
        return None
    name = METRIC_NAMES.get(metric, metric)
    sentence = f"{loss_name(chosen[0][1])}, change of the {name} from its peak to the largest KL: {'; '.join(parts)}."
    if metric != "win_rate":
        return Finding(sentence, "not in the paper")
    return Finding(sentence, "agrees" if all(falls) else "cannot be told")


def over_optimisation_finding(results: Sequence[CheckpointResult], method: Method) -> Finding | None:
    """Whether the true score falls below SFT's where the golden judge's win rate rises; the paper had no true score."""
    changes: dict[str, list[np.ndarray]] = {"win_rate": [], "rubric": []}
    kls = []
    for seed in _seeds(results):
        runs = _runs(results, method, seed, "rubric")
        if not runs:
            continue
        ends = [runs[0][0], _furthest(runs)]
        kls.append(ends[1].mean("kl"))
        for metric, values in changes.items():
            means = _replicates(ends, metric)
            values.append(means[:, 1] - means[:, 0])
    if not kls:
        return None
    judged, true = _interval(changes["win_rate"]), _interval(changes["rubric"])
    if judged.low > 0 and true.high < 0:
        reading = "the golden judge is over-optimised: it applauds while true quality falls below that of SFT"
    elif judged.low > 0 and true.low > 0:
        reading = "the golden judge and the rubric both rise above SFT"
    else:
        reading = "the two changes are not both clear of zero in opposite directions"
    return Finding(
        f"{loss_name(method[1])} {method[0]} at its largest KL, {np.mean(kls):.2g} nats, against SFT: "
        f"golden win rate {in_words(judged, 'win_rate')}, rubric {in_words(true, 'rubric')}; {reading}.",
        "not in the paper",
    )


def final_accuracy_finding(results: Sequence[CheckpointResult], loss: str) -> Finding | None:
    """The paper: at the end offline policies classify 60-70 % of D_golden right, online policies about 50 % or less."""
    final = {arm: _final(results, (arm, loss), "accuracy") for arm in _trained_arms(results, loss)}
    intervals = {arm: _interval(list(values.values())).within(0.0, 1.0) for arm, values in final.items() if values}
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
    intervals = {arm: _interval(list(values.values())) for arm, values in finals.items()}
    listed = "; ".join(f"{arm} {_plain(interval, 'nats')}" for arm, interval in intervals.items())
    name = loss_name(loss)
    sentence = f"{name}, log-probability of the winner relative to SFT at the end of training: {listed}"
    online, offline = finals.get("online", {}), finals.get("offline", {})
    shared = [online[seed] - offline[seed] for seed in online if seed in offline]
    if not shared:
        return Finding(f"{sentence}.", "cannot be told")
    gap = _interval(shared)
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
    for seed in _seeds(results):
        runs = [
            run for run in _runs(results, method, seed, "win_rate") if all("accuracy" in r.outcomes for r in run[1:])
        ]
        if len(runs) >= 3:
            seeded.append(_correlations(runs, seed))
    name = f"{loss_name(method[1])} {method[0]}"
    if not seeded or any(math.isnan(values[0]) for values in seeded):
        return Finding(
            f"{name}: fewer than three runs of differing results, too few to relate accuracy to win rate.",
            "cannot be told",
        )
    rho = _interval(seeded).within(-1.0, 1.0)
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
    for seed in _seeds(results):
        last: dict[str, CheckpointResult] = {}
        for result in results:
            if result.method == method and result.seed == seed and metric in result.outcomes:
                last[result.setting] = max(last.get(result.setting, result), result, key=lambda r: r.step)
        chosen = [result for setting, result in last.items() if setting in online] or list(last.values())
        if chosen:
            replicates[seed] = _replicates(chosen, metric).mean(axis=1)
    return replicates


# Numbers in words.


def in_words(interval: Interval, metric: str) -> str:
    """A change with its interval: win rates and accuracies in percentage points."""
    scale, form, _ = _FORMS.get(metric, (1, ".3g", ""))
    low, high = _signs(f"{scale * interval.low:+{form}}"), _signs(f"{scale * interval.high:+{form}}")
    return f"{_amount(interval.value, metric)} (95\u00a0% interval {low} to {high})"


def _amount(value: float, metric: str) -> str:
    scale, form, unit = _FORMS.get(metric, (1, ".3g", ""))
    return _signs(f"{scale * value:+{form}}{unit}")


def _plain(interval: Interval, metric: str) -> str:
    """A level with its interval: win rates and accuracies in per cent."""
    scale, form, unit = _FORMS.get(metric, (1, ".3g", ""))
    unit = "\u00a0%" if metric in PROPORTIONS else unit
    value, low, high = (f"{scale * end:{form}}" for end in (interval.value, interval.low, interval.high))
    return _signs(f"{value}{unit} ({low} to {high})")


def _signs(number: str) -> str:
    return number.replace("-", "\u2212")
