"""The claims of the paper (arXiv 2405.08448, its hypotheses one by one) as data, and a study's answer to each.

A claim is one entry of `CLAIMS`: the paper's statement, an estimate that tests it, and the range of the estimate if the
paper is right. One rule decides all claims:

- a claim agrees if the interval of the estimate lies inside the range;
- it disagrees if the interval lies outside the range;
- otherwise it cannot be told; also if the study lacks an arm, a metric or a second seed.

The interval has a confidence of 95 % after a correction for the number of claims (Benjamini and Hochberg, 1995). The
claims that a study measures with at least `FEWEST_SEEDS` seeds form one family. At most one in twenty of the decided
claims is expected to be wrong, if the estimates depend on each other positively.

If all N examples of a fraction are equal, resampling finds no spread. The interval then allows for examples that the
study did not see: up to about 3/N of all examples may differ (the "rule of three").
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from scipy import stats

from alignment_gap.configuration import load_named
from alignment_gap.errors import UserError
from alignment_gap.evaluation.intervals import CONFIDENCE, Interval, Spread, spread_over_groups, unseen_share
from alignment_gap.study.analysis import METRICS
from alignment_gap.study.estimates import (
    CORRELATION,
    AtEnd,
    Correlation,
    Difference,
    EndGap,
    EqualKl,
    Estimate,
    Evidence,
    Fall,
    Narrowing,
    NotMeasured,
    PeakGap,
    ProxyLead,
    Rise,
    bounds,
)

Verdict = Literal["agrees", "disagrees", "cannot be told"]

FEWEST_SEEDS = 2
"""With fewer seeds, nothing is known about another training run, and no claim is decided."""
MARGIN = 0.03
"""Win rates that differ by less count as equal: the paper's "about as good", "hardly better", "little gain"."""
CHANCE = 0.55
"""An accuracy up to this, and its mirror image, count as chance: the paper's "around or below 50 %"."""
STRONG = 0.5
"""An accuracy with a weaker correlation with the win rate, of either sign, does not predict it."""

ABOVE_ZERO = (0.0, math.inf)
BELOW_ZERO = (-math.inf, 0.0)
LEVEL = (-MARGIN, MARGIN)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
      name: name of the claim.
      paper: the paper's statement, in one sentence.
      figure: the paper's figure that shows it.
      hypothesis: the number of the paper's hypothesis; 0 for its opening comparison.
      estimate: the estimate that tests the claim.
      holds: the range of the estimate if the claim is right, in the unit of the estimate.
    """

    name: str
    paper: str
    figure: str
    hypothesis: int
    estimate: Estimate
    holds: tuple[float, float]

    def __post_init__(self) -> None:
        """Raises UserError if the range is empty."""
        low, high = self.holds
        if not low < high:
            raise UserError(f"the claim {self.name!r} has holds={self.holds}: give the lower end first")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A study's answer to a claim.

    Attributes:
      claim: the claim.
      verdict: whether the study agrees with the paper.
      reason: why the claim cannot be told, as a clause; empty if it is decided.
      seeds: the seeds that measured it.
      interval: the estimate (the mean over the seeds) with its 95 % interval before the correction; None if not
        measured.
      p_value: 1 minus the largest confidence at which the interval decides the claim; nan if not measured.
      adjusted: the p-value after the correction; nan if the claim is not in the family.
      detectable: the distance between the estimate and the end of the range at which this number of seeds and examples
        decides a claim four times out of five, before the correction; nan if not measured.
    """

    claim: Claim
    verdict: Verdict
    reason: str
    seeds: tuple[int, ...] = ()
    interval: Interval | None = None
    p_value: float = math.nan
    adjusted: float = math.nan
    detectable: float = math.nan


def claims_of(names: Sequence[str]) -> tuple[Claim, ...]:
    """The paper's claims, and the claims with these names ("module:object"); raises UserError if one is not a claim."""
    further = [load_named(name, "claims: the claim") for name in names if ":" in name]
    wrong = [name for name in names if ":" not in name]
    wrong += [name for name, claim in zip(names, further, strict=False) if not isinstance(claim, Claim)]
    if wrong:
        raise UserError(f"claims has {wrong[0]!r}, which is not a claim: write module:object for your own claim")
    taken: set[str] = set()
    for claim in (*CLAIMS, *further):
        if claim.name in taken:
            raise UserError(f"claims has a second {claim.name!r}: rename it")
        taken.add(claim.name)
    return (*CLAIMS, *further)


def answers(evidence: Evidence, claims: Sequence[Claim]) -> list[Answer]:
    """A study's answers to all claims, in order; the correction is over the claims that it measured."""
    measured, found = {}, {}
    for claim in claims:
        try:
            by_seed = claim.estimate(evidence)
        except NotMeasured as error:
            found[claim.name] = Answer(claim, "cannot be told", str(error))
        else:
            spread = _with_width(spread_over_groups([*by_seed.values()]), claim.estimate, evidence, [*by_seed])
            measured[claim.name] = (tuple(by_seed), spread)
    p_values = {c.name: _p_value(measured[c.name][1], c.holds) for c in claims if c.name in measured}
    family = [name for name in p_values if len(measured[name][0]) >= FEWEST_SEEDS]
    adjusted = stats.false_discovery_control([p_values[name] for name in family]) if family else []
    corrected = dict(zip(family, map(float, adjusted), strict=True))
    for claim in claims:
        if claim.name in measured:
            p_value, p_adjusted = p_values[claim.name], corrected.get(claim.name, math.nan)
            found[claim.name] = _answer(claim, *measured[claim.name], p_value, p_adjusted)
    return [found[claim.name] for claim in claims]


def _with_width(spread: Spread, estimate: Estimate, evidence: Evidence, seeds: Sequence[int]) -> Spread:
    """The spread of an estimate; if all examples of a fraction are equal, the width that unseen examples may add."""
    if spread.examples or spread.between or estimate.metric == CORRELATION or not METRICS[estimate.metric].is_share:
        return spread
    half_width = unseen_share(evidence.examples(estimate.metric, seeds))
    return spread._replace(examples=half_width / float(stats.norm.ppf((1 + CONFIDENCE) / 2)))


def _answer(claim: Claim, seeds: tuple[int, ...], spread: Spread, p_value: float, adjusted: float) -> Answer:
    """The answer that follows from the numbers."""
    low, high = claim.holds
    reading: Verdict = "agrees" if low < spread.value < high else "disagrees"
    verdict, reason = reading, ""
    limit = 1 - CONFIDENCE
    if len(seeds) < FEWEST_SEEDS:
        verdict, reason = "cannot be told", "one seed"
        reason += f"; over its examples alone it {reading}" if p_value < limit else ""
    elif not adjusted < limit:
        verdict, reason = "cannot be told", "the interval leaves both open"
        if p_value < limit:
            reason = f"it {reading} by itself, not after the correction for the number of claims"
    interval = spread.interval.within(*bounds(claim.estimate))
    return Answer(claim, verdict, reason, seeds, interval, p_value, adjusted, spread.detectable)


def _p_value(spread: Spread, holds: tuple[float, float]) -> float:
    """The p-value for the end of the range that is nearest to the estimate; the interval must not reach this end."""
    return spread.p_value(min(holds, key=lambda end: abs(spread.value - end)))


# The table. Its rules were fixed before the runs; docs/results/README.md tells what was corrected after them.

_ONLINE, _SHUFFLED, _OFFLINE = ("online", "ipo"), ("shuffled", "ipo"), ("offline", "ipo")
_ONLINE_2, _SHUFFLED_2, _OFFLINE_2 = ("online", "best_of_n"), ("shuffled", "best_of_n"), ("offline", "best_of_n")
_FINAL, _SFT_EARLY, _EARLY_FINAL = ("final_vs_final", "ipo"), ("sft_vs_early", "ipo"), ("early_vs_final", "ipo")

CLAIMS = (
    Claim(
        "online-beats-offline",
        "At equal KL online is better than offline.",
        "1",
        0,
        EqualKl(_ONLINE, _OFFLINE),
        ABOVE_ZERO,
    ),
    Claim(
        "online-peaks-higher",
        "The peak of online is higher than that of offline.",
        "1",
        0,
        PeakGap(_ONLINE, _OFFLINE),
        ABOVE_ZERO,
    ),
    Claim("online-rises", "With KL the win rate of online first rises.", "1", 0, Rise(_ONLINE), ABOVE_ZERO),
    Claim("online-falls", "With more KL the win rate of online falls again.", "1", 0, Fall(_ONLINE), ABOVE_ZERO),
    Claim("offline-rises", "With KL the win rate of offline first rises.", "1", 0, Rise(_OFFLINE), ABOVE_ZERO),
    Claim("offline-falls", "With more KL the win rate of offline falls again.", "1", 0, Fall(_OFFLINE), ABOVE_ZERO),
    Claim(
        "replay-is-online",
        "D_online replayed in its order is the online run.",
        "13",
        1,
        EqualKl(("replayed", "ipo"), _ONLINE, at_shared_settings=True),
        LEVEL,
    ),
    Claim(
        "shuffled-hardly-beats-offline",
        "Offline on the shuffled D_online is hardly better than on D_golden.",
        "4",
        1,
        EqualKl(_SHUFFLED, _OFFLINE),
        (-math.inf, MARGIN),
    ),
    Claim(
        "online-beats-shuffled",
        "Online is better than offline on its own shuffled data.",
        "4",
        1,
        EqualKl(_ONLINE, _SHUFFLED),
        ABOVE_ZERO,
    ),
    Claim(
        "small-windows-are-harmless",
        "Shuffling D_online within small windows is harmless.",
        "13",
        1,
        EqualKl(("small_windows", "ipo"), _ONLINE, at_shared_settings=True),
        LEVEL,
    ),
    Claim(
        "large-windows-hurt",
        "Shuffling D_online within large windows hurts.",
        "13",
        1,
        EqualKl(_ONLINE, ("large_windows", "ipo"), at_shared_settings=True),
        ABOVE_ZERO,
    ),
    Claim(
        "good-pairs-gain-little",
        "Offline on pairs of the final online policy gains little over SFT.",
        "5",
        2,
        Rise(_FINAL),
        (-math.inf, MARGIN),
    ),
    Claim(
        "proxy-classifies-best",
        "The proxy classifies held-out pairs better than any policy of its size.",
        "6",
        3,
        ProxyLead((_ONLINE, _OFFLINE), "heldout_accuracy"),
        ABOVE_ZERO,
    ),
    Claim(
        "proxy-classifies-online-data-best",
        "The proxy classifies the data of the online run better than the policies.",
        "6",
        3,
        ProxyLead((_ONLINE, _OFFLINE), "stream_accuracy"),
        ABOVE_ZERO,
    ),
    Claim(
        "offline-classifies",
        "Offline policies classify D_golden better than chance (60 to 70 %).",
        "7",
        3,
        AtEnd((_OFFLINE,), "accuracy"),
        (CHANCE, math.inf),
    ),
    Claim(
        "online-does-not-classify",
        "Online policies classify D_golden by chance (about 50 % or less).",
        "7",
        3,
        AtEnd((_ONLINE,), "accuracy"),
        (-math.inf, CHANCE),
    ),
    Claim(
        "accuracy-predicts-nothing",
        "Over the offline checkpoints accuracy does not predict the win rate.",
        "7",
        3,
        Correlation(_OFFLINE, "accuracy", "win_rate"),
        (-STRONG, STRONG),
    ),
    Claim(
        "winners-fall",
        "The winner's log-probability falls below SFT's for every method.",
        "8",
        3,
        AtEnd((_ONLINE, _SHUFFLED, _OFFLINE), "chosen_log_ratio"),
        BELOW_ZERO,
    ),
    Claim(
        "winners-fall-most-offline",
        "The winner's log-probability falls most for offline.",
        "8",
        3,
        EndGap(_ONLINE, _OFFLINE, "chosen_log_ratio"),
        ABOVE_ZERO,
    ),
    Claim(
        "online-cannot-tell-its-own",
        "Online policies classify their own samples by chance.",
        "6",
        3,
        AtEnd((_ONLINE,), "own_accuracy"),
        (1 - CHANCE, CHANCE),
    ),
    Claim(
        "offline-cannot-tell-its-own",
        "Offline policies classify their own samples by chance.",
        "6",
        3,
        AtEnd((_OFFLINE,), "own_accuracy", settings_of=_ONLINE),
        (1 - CHANCE, CHANCE),
    ),
    Claim(
        "gap-without-contrast",
        "Online beats offline with best-of-2, which contrasts nothing, too.",
        "9",
        4,
        EqualKl(_ONLINE_2, _OFFLINE_2),
        ABOVE_ZERO,
    ),
    Claim(
        "shuffled-without-contrast",
        "With best-of-2 shuffled is about as good as online.",
        "9",
        4,
        EqualKl(_SHUFFLED_2, _ONLINE_2),
        LEVEL,
    ),
    Claim(
        "scale-narrows-shuffled",
        "The gap between online and shuffled narrows as policies grow.",
        "11",
        5,
        Narrowing(_ONLINE, _SHUFFLED),
        ABOVE_ZERO,
    ),
    Claim(
        "scale-narrows-offline-less",
        "The gap between online and offline narrows more slowly than the one to shuffled.",
        "11",
        5,
        Difference(Narrowing(_ONLINE, _SHUFFLED), Narrowing(_ONLINE, _OFFLINE)),
        ABOVE_ZERO,
    ),
    Claim(
        "sft-side-beats-quality",
        "Pairs with one side of SFT teach more than pairs of the final policy alone.",
        "12",
        6,
        EqualKl(_SFT_EARLY, _FINAL, at_shared_settings=True),
        ABOVE_ZERO,
    ),
    Claim(
        "sft-side-beats-contrast",
        "Pairs with one side of SFT teach more than the contrast of an early and the final online policy.",
        "12",
        6,
        EqualKl(_SFT_EARLY, _EARLY_FINAL, at_shared_settings=True),
        ABOVE_ZERO,
    ),
    Claim(
        "golden-pairs-beat-quality",
        "D_golden, both sides close to SFT, teaches more than pairs of the final policy.",
        "12",
        6,
        EqualKl(_OFFLINE, _FINAL, at_shared_settings=True),
        ABOVE_ZERO,
    ),
)
