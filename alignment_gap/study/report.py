"""The report of a study: one HTML page that opens offline, the figures as PNG, and the data behind them.

STUDY/
  report.html      the page
  figures/         its figures
  results.csv      a row for each checkpoint
  claims.csv       a row for each claim
  comparisons.csv  a row for each two arms that are compared at equal KL, by win rate and by rubric
  fits.csv         a row for each fitted curve of over-optimisation
  outcomes.npz     every measured number, example by example
  facts.json       the settings, the versions, the accuracy of the judges, the duration of each job
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignment_gap.configuration import flatten, from_dict, to_dict
from alignment_gap.errors import UserError
from alignment_gap.evaluation.intervals import Interval
from alignment_gap.evaluation.results import csv_text
from alignment_gap.folders import AnyPath, read_json, write_bytes, write_json
from alignment_gap.study import analysis, curves, figures, findings
from alignment_gap.study.analysis import METRICS, ORIGIN, CheckpointResult, Comparison, Method, loss_name
from alignment_gap.study.arms import GOLDEN, Arm, arms_of
from alignment_gap.study.claims import Answer, answers, claims_of
from alignment_gap.study.config import StudyConfig
from alignment_gap.study.curves import TrainingRun
from alignment_gap.study.estimates import Estimate, Evidence
from alignment_gap.study.findings import MINUS, nats
from alignment_gap.study.marks import Figure
from alignment_gap.study.outcomes import write_outcomes
from alignment_gap.study.page import render, write_page
from alignment_gap.tables import text_table

FACTS = "facts.json"
_NONE = "\u2013"
_OWN_FIGURES = ("figure_*.png", "equal_kl_*.png", "training_*.png")
CLAIM_COLUMNS = (
    *("claim", "hypothesis", "figure", "paper", "estimate", "holds_above", "holds_below", "verdict"),
    *("reason", "value", "low", "high", "seeds", "p_value", "p_adjusted", "detectable"),
)
COMPARISON_COLUMNS = (
    *("first", "first_loss", "second", "second_loss", "metric", "seeds", "kl_low", "kl_high"),
    *("mean_gap", "mean_gap_low", "mean_gap_high", "peak_gap", "peak_gap_low", "peak_gap_high", "better"),
)
FIT_COLUMNS = ("arm", "loss", "score", "curve", "a", "a_low", "a_high", "b", "b_low", "b_high")
Row = dict[str, str]
"""A row of a table: its cells, by header."""


@dataclasses.dataclass(frozen=True)
class JudgeFacts:
    """The accuracy of a judge of one seed.

    Attributes:
      seed: seed of the judge.
      measured: which judge, on which pairs.
      shares: the fraction of pairs on which it agrees with labels or another judge, by the name of these.
      ends: the two ends of each fraction's 95 % interval over pairs.
    """

    seed: int
    measured: str
    shares: Mapping[str, float]
    ends: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReportContext:
    """The content of the report besides the measurements.

    Attributes:
      config: settings of the study.
      versions: versions of packages, by name.
      judges: accuracy of the judges, by seed.
      samples: responses for each prompt, as text; keys are arm, loss, step, response and rubric (None without one).
      wall_time: duration of each job.
      notes: sentences on how far the numbers can be trusted.
      diagrams: diagrams of the graph; they come before the other figures.
      training: the training jobs with their metrics.
    """

    config: StudyConfig
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    judges: Sequence[JudgeFacts] = ()
    samples: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(default_factory=dict)
    wall_time: Mapping[str, datetime.timedelta] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    diagrams: Sequence[Figure] = ()
    training: Sequence[TrainingRun] = ()


def write_report(folder: AnyPath, results: Sequence[CheckpointResult], context: ReportContext) -> AnyPath:
    """Writes all files of a report, the page last; each file appears complete or not at all.

    Returns:
      The path of report.html.
    """
    if not results:
        raise UserError("there are no evaluated checkpoints to report: run the study's evaluation first")
    folder.mkdir(parents=True, exist_ok=True)
    table = analysis.results_table(results)
    arms = arms_of((*context.config.arms.names, *context.config.arms.further))
    evidence = Evidence(results)
    comparisons = findings.study_comparisons(evidence, arms)
    answered = answers(evidence, claims_of(context.config.claims))
    drawn = [*context.diagrams, *figures.study_figures(evidence, table, comparisons, answered, arms)]
    training = curves.stage_figures(context.training, results, arms)
    fits = findings.over_optimisation_fits(evidence, arms)
    page = _page(evidence, context, arms, comparisons, answered, fits, drawn, training)
    write_bytes(folder / "results.csv", csv_text(table, analysis.COLUMNS).encode())
    write_bytes(folder / "claims.csv", csv_text(map(claim_record, answered), CLAIM_COLUMNS).encode())
    write_bytes(folder / "comparisons.csv", csv_text(map(comparison_record, comparisons), COMPARISON_COLUMNS).encode())
    write_bytes(folder / "fits.csv", csv_text([fit_record(*each) for each in fits], FIT_COLUMNS).encode())
    write_outcomes(folder, results)
    _write_facts(folder, context)
    return write_page(folder, page, [*drawn, *training], stale=_OWN_FIGURES)


def _write_facts(folder: AnyPath, context: ReportContext) -> None:
    """Writes the report's context, except for parts that come from the jobs' own folders."""
    facts = {
        "settings": to_dict(context.config),
        "versions": dict(context.versions),
        "judges": [dataclasses.asdict(judge) for judge in context.judges],
        "seconds": {job: time.total_seconds() for job, time in context.wall_time.items()},
    }
    write_json(folder / FACTS, facts)


def read_facts(folder: AnyPath) -> ReportContext:
    """The context that `write_report` stored; raises UserError if the folder has no report of a study."""
    path, remedy = folder / FACTS, "write its report again with alignment-gap study --job=report"
    if not path.exists():
        raise UserError(f"{folder} has no {FACTS}: {remedy}")
    facts = read_json(path, remedy=remedy)
    try:
        return ReportContext(
            config=from_dict(StudyConfig, facts["settings"]),
            versions=facts["versions"],
            judges=[JudgeFacts(**judge) for judge in facts["judges"]],
            wall_time={job: datetime.timedelta(seconds=seconds) for job, seconds in facts["seconds"].items()},
        )
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{path} lacks facts of a report: {remedy}") from None


def peaks_text(results: Sequence[CheckpointResult]) -> str:
    """The table of the peaks of the study's own size, for the terminal."""
    rows = _peaks_table(Evidence(results).results)
    return text_table(list(rows[0]), [list(row.values()) for row in rows])


# The page.


def _page(
    evidence: Evidence,
    context: ReportContext,
    arms: Sequence[Arm],
    comparisons: Sequence[Comparison],
    answered: Sequence[Answer],
    fits: Sequence[findings.OverOptimisation],
    drawn: Sequence[Figure],
    training: Sequence[Figure],
) -> str:
    seeds, results = evidence.seeds, evidence.everything
    settings = flatten(to_dict(context.config)).items()
    return render(
        "report.html.jinja",
        [*drawn, *training],
        name=context.config.name,
        seeds=seeds,
        count=len(results),
        claims=[_claim_row(answer) for answer in answered],
        none_shown=_NONE,
        verdicts={answer.claim.name: answer.verdict for answer in answered},
        answers=[
            (findings.equal_kl_headline(c), " ".join(filter(None, _answer_sentences(evidence, c))))
            for c in findings.asked(comparisons, arms)
        ],
        coverage=findings.coverage_sentence(len(seeds)),
        notes=context.notes,
        comparisons=[_comparison_row(comparison) for comparison in comparisons],
        arms_read=[(arm.name, arm.reads) for arm in (*arms, GOLDEN)],
        has_rubric=any("rubric" in result.outcomes for result in results),
        drawn=drawn,
        curves=training,
        throughput=curves.throughput_table(context.training),
        fits=[_fit_row(*each) for each in fits],
        peaks=_peaks_table(evidence.results),
        judges=_judges_table(context.judges),
        runs=_runs_table(results),
        # Prepared data is not prepared by `task`.
        settings=[
            {"Setting": name, "Value": _text(value)}
            for name, value in settings
            if context.config.prepared is None or not name.startswith("task.")
        ],
        samples=context.samples,
        versions=[{"Package": package, "Version": version} for package, version in context.versions.items()],
        times=[{"Job": job, "Wall time": str(time)} for job, time in context.wall_time.items()],
    )


def _answer_sentences(evidence: Evidence, comparison: Comparison) -> tuple[str, ...]:
    """The sentences on the study's question after the headline."""
    return (
        findings.equal_kl_detail(comparison),
        findings.peaks_apart(evidence, comparison),
        findings.seed_gaps_sentence(comparison),
    )


def _claim_row(answer: Answer) -> Row:
    """A claim as a row of the first table of the page."""
    claim, numbers = answer.claim, (_NONE, _NONE)
    if answer.interval is not None:
        numbers = findings.estimated(claim.estimate, answer.interval)
    return {
        "Claim": claim.name,
        "The paper": claim.paper,
        "Figure": claim.figure,
        "Here": answer.verdict,
        "Measured": str(claim.estimate),
        "Agrees if": _range(claim.estimate, claim.holds),
        "Value": numbers[0],
        "95 % interval": numbers[1],
        "Seeds": str(len(answer.seeds)),
        "Could see": _NONE if answer.interval is None else findings.distance(claim.estimate, answer.detectable),
        "Why not told": answer.reason,
    }


def _range(estimate: Estimate, holds: tuple[float, float]) -> str:
    """The range of an estimate that agrees with the paper, in its unit."""
    low, high = (findings.bare(estimate, end) for end in holds)
    if math.isinf(holds[0]):
        return f"below {high}"
    return f"above {low}" if math.isinf(holds[1]) else f"{low} to {high}"


def claim_record(answer: Answer) -> dict[str, object]:
    """A claim as a row of claims.csv, in the unit of the estimate."""
    claim, interval = answer.claim, answer.interval or Interval(math.nan, math.nan, math.nan)
    values = (
        *(claim.name, claim.hypothesis, claim.figure, claim.paper, str(claim.estimate), *claim.holds, answer.verdict),
        *(answer.reason, interval.value, interval.low, interval.high, len(answer.seeds)),
        *(answer.p_value, answer.adjusted, answer.detectable),
    )
    return dict(zip(CLAIM_COLUMNS, values, strict=True))


def _comparison_row(comparison: Comparison) -> Row:
    budgets, metric = comparison.budgets, comparison.metric
    return {
        "Loss": loss_name(comparison.first[1]),
        "Pair": f"{comparison.first[0]} {MINUS} {comparison.second[0]}",
        "Metric": metric.replace("_", " "),
        "KL budgets (nats)": f"{nats(budgets[0])} to {nats(budgets[-1])}" if len(budgets) else "none shared",
        "Mean gap": findings.in_table(comparison.mean_gap, metric) if len(budgets) else _NONE,
        "Peak gap": findings.in_table(comparison.peak_gap, metric),
        "Better at equal KL": _better(comparison),
    }


def comparison_record(comparison: Comparison) -> dict[str, object]:
    """A comparison as a row of comparisons.csv, in the unit of the metric; empty cells if the arms share no KL."""
    budgets = comparison.budgets if len(comparison.budgets) else [math.nan]
    gaps = [end for gap in (comparison.mean_gap, comparison.peak_gap) for end in (gap.value, gap.low, gap.high)]
    values = (
        *(*comparison.first, *comparison.second, comparison.metric, len(comparison.seeds), budgets[0], budgets[-1]),
        *(*gaps, comparison.better),
    )
    return dict(zip(COMPARISON_COLUMNS, values, strict=True))


def _better(comparison: Comparison) -> str:
    if not len(comparison.budgets):
        return "cannot be compared"
    return "neither beats SFT" if comparison.both_at_origin else comparison.better or "no claim"


def _fit_row(method: Method, metric: str, curve: str, coefficients: Sequence[Interval]) -> Row:
    """A fitted curve of over-optimisation; for fractions, in percentage points. `fits.fit` has the units of a and b."""
    a, b = (findings.in_table(each, metric) for each in coefficients)
    form = {"best_of_n": "d(a − b d)", "rl": "d(a − b log d)"}[curve]
    return {
        "Loss": loss_name(method[1]),
        "Arm": method[0],
        "Score": METRICS[metric].words,
        "Curve": form,
        "a": a,
        "b": b,
    }


def fit_record(method: Method, metric: str, curve: str, coefficients: Sequence[Interval]) -> dict[str, object]:
    """A fitted curve as a row of fits.csv, in the unit of the score; see `fits.fit` for the units of a and b."""
    ends = [end for each in coefficients for end in (each.value, each.low, each.high)]
    return dict(zip(FIT_COLUMNS, (*method, metric, curve, *ends), strict=True))


def _peaks_table(results: Sequence[CheckpointResult]) -> list[Row]:
    return [
        {
            "Loss": loss_name(peak.checkpoint.loss),
            "Arm": peak.checkpoint.arm,
            "Setting": peak.checkpoint.setting,
            "Seed": str(peak.checkpoint.seed),
            "Step": str(peak.checkpoint.step),
            "KL (nats)": _number(peak.checkpoint.mean("kl"), ".2f"),
            "Win rate (95 %)": findings.level(peak.interval, "win_rate"),
            "Cross-fitted": f"{peak.cross_fitted:.1%}",
            "Rubric": _number(peak.checkpoint.mean("rubric"), ".3f"),
        }
        for peak in analysis.peaks(results)
    ]


def _judges_table(judges: Sequence[JudgeFacts]) -> list[Row]:
    """A row for each judge, with a column for everything that a judge was compared with."""
    whom = dict.fromkeys(name for facts in judges for name in facts.shares)
    return [
        {"Seed": str(facts.seed), "Judge": facts.measured}
        | {f"Agrees with {name} (95 %)": _share(facts, name) if name in facts.shares else _NONE for name in whom}
        for facts in judges
    ]


def _share(facts: JudgeFacts, name: str) -> str:
    """A fraction of pairs with its interval, if the facts have one: those of earlier versions do not."""
    share = facts.shares[name]
    return findings.level(Interval(share, *facts.ends[name]), "accuracy") if facts.ends else f"{share:.1%}"


def _runs_table(results: Sequence[CheckpointResult]) -> list[Row]:
    runs = dict.fromkeys((r.arm, loss_name(r.loss), r.setting) for r in results if r.arm != ORIGIN)
    return [{"Arm": arm, "Loss": loss, "Setting": setting} for arm, loss, setting in runs]


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:g}"
    return str(value)


def _number(value: float, form: str) -> str:
    return "not measured" if math.isnan(value) else format(value, form)
