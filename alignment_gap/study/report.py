"""The report of a study: one HTML page that opens offline, the figures as PNG, and the numbers as CSV."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from alignment_gap.errors import UserError
from alignment_gap.evaluation.intervals import Interval
from alignment_gap.study import analysis, figures, findings
from alignment_gap.study.analysis import CheckpointResult, Comparison, Peak, loss_name
from alignment_gap.study.figures import Figure

try:
    import jinja2
    import markupsafe
    import vl_convert
except ImportError as error:
    raise UserError(f"{error.name} writes the report and is not installed: pip install alignment-gap[study]") from error

_TEMPLATE = "report.html.jinja"
_DARK = {"white": "#16191d", figures.INK: "#b9c0c8", figures.GRID: "#2d333a", figures.LINE: "#6b737d"}
_OWN_FIGURES = ("figure_*.png", "equal_kl_*.png")


@dataclasses.dataclass(frozen=True)
class JudgeFacts:
    """How good the judges of one seed are; shares of pairs, nan where not measured.

    Attributes:
      seed: of the judges.
      golden_accuracy: golden model on held-out human labels.
      golden_rubric_agreement: golden model against the rubric without its rater's noise, None without a rubric.
      proxy_train_accuracy: proxy on the pairs of D_golden that it was trained on.
      proxy_validation_accuracy: proxy on held-out pairs of D_golden.
    """

    seed: int
    golden_accuracy: float
    golden_rubric_agreement: float | None
    proxy_train_accuracy: float
    proxy_validation_accuracy: float


@dataclasses.dataclass(frozen=True)
class ReportContext:
    """What the report says beside the numbers.

    Attributes:
      study: its name.
      config: all settings, nested; under "arms" a mapping by name or a list of mappings, shown as a table.
      versions: of the packages, by name.
      seeds: all of them.
      judges: their accuracies, one entry per seed.
      samples: responses with the keys prompt, arm, loss, step, response and rubric (None without one), as text.
      wall_time: seconds of each stage.
      notes: what the numbers can bear, in sentences.
    """

    study: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    judges: Sequence[JudgeFacts] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    wall_time: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class _Table:
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    folder: str | os.PathLike[str], results: Sequence[CheckpointResult], context: ReportContext
) -> pathlib.Path:
    """Writes report.html, results.csv and figures/*.png; each file appears complete or not at all, the page last.

    Returns:
      The path of report.html.
    """
    if not results:
        raise UserError("there are no evaluated checkpoints to report: run the study's evaluation first")
    folder = pathlib.Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    table = analysis.results_table(results)
    comparisons = figures.study_comparisons(results)
    drawn = figures.study_figures(results, table, comparisons)
    page = _page(results, context, comparisons, drawn)
    _replace(folder / "results.csv", analysis.csv_text(table).encode())
    names = {f"{figure.name}.png" for figure in drawn if not figure.missing}
    for figure in drawn:
        if not figure.missing:
            _replace(folder / "figures" / f"{figure.name}.png", figure.png())
    for stale in (path for pattern in _OWN_FIGURES for path in (folder / "figures").glob(pattern)):
        if stale.name not in names:
            stale.unlink()
    _replace(folder / "report.html", page.encode())
    return folder / "report.html"


def peaks_text(results: Sequence[CheckpointResult]) -> str:
    """The table of the peaks for a terminal."""
    table = _peaks_table(analysis.peaks(results))
    lines = [list(table.headers), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _replace(path: pathlib.Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# The page.


def _page(
    results: Sequence[CheckpointResult],
    context: ReportContext,
    comparisons: Sequence[Comparison],
    drawn: Sequence[Figure],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignment_gap.study", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    asked = [c for c in comparisons if c.metric == "win_rate" and (c.first[0], c.second[0]) == figures.PAIRS[0]]
    return environment.get_template(_TEMPLATE).render(
        context=context,
        count=len(results),
        answers=[
            (
                findings.equal_kl_headline(c),
                f"{findings.equal_kl_detail(c)} {findings.seed_gaps_sentence(c)}",
                findings.equal_kl_finding(c).agreement,
            )
            for c in asked
        ],
        coverage=findings.coverage_sentence(len(set(context.seeds))),
        comparisons=_comparisons_table(comparisons) if comparisons else None,
        has_rubric=any("rubric" in result.outcomes for result in results),
        figures=drawn,
        peaks=_peaks_table(analysis.peaks(results)),
        judges=_judges_table(context.judges),
        arms=_arms_table(context.config.get("arms")),
        settings=list(_flat({name: part for name, part in context.config.items() if name != "arms"})),
        samples=_by_prompt(context.samples),
        times=[(stage, _duration(seconds)) for stage, seconds in context.wall_time.items()],
        library=markupsafe.Markup(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        specs=_json({figure.name: figure.spec for figure in drawn if not figure.missing}),
        greys=_json(_DARK),
    )


def _json(value: object) -> markupsafe.Markup:
    """JSON that can stand inside a script element whatever its strings hold."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return markupsafe.Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _comparisons_table(comparisons: Iterable[Comparison]) -> _Table:
    headers = ("Loss", "Pair", "Metric", "KL budgets (nats)", "Mean gap", "Peak gap", "Better at equal KL")
    rows = [
        (
            loss_name(c.first[1]),
            f"{c.first[0]} \u2212 {c.second[0]}",
            c.metric.replace("_", " "),
            f"{findings.nats(c.budgets[0])} to {findings.nats(c.budgets[-1])}" if len(c.budgets) else "none shared",
            _gap(c.mean_gap, c.metric) if len(c.budgets) else "\u2013",
            _gap(c.peak_gap, c.metric),
            _better(c),
        )
        for c in comparisons
    ]
    return _Table(headers, rows)


def _better(comparison: Comparison) -> str:
    if not len(comparison.budgets):
        return "cannot be compared"
    return "neither beats SFT" if findings.both_at_origin(comparison) else comparison.better or "no claim"


def _gap(interval: Interval, metric: str) -> str:
    scale, places = (100, ".1f") if metric in analysis.PROPORTIONS else (1, ".3f")
    value, low, high = (scale * end for end in (interval.value, interval.low, interval.high))
    return f"{value:+{places}} ({low:+{places}} to {high:+{places}})".replace("-", "\u2212")


def _peaks_table(peaks: Sequence[Peak]) -> _Table:
    headers = ("Loss", "Arm", "Setting", "Seed", "Step", "KL (nats)", "Win rate (95 %)", "Cross-fitted", "Rubric")
    rows = [
        (
            loss_name(peak.checkpoint.loss),
            peak.checkpoint.arm,
            "" if peak.checkpoint.arm == analysis.ORIGIN else peak.checkpoint.setting,
            str(peak.checkpoint.seed),
            str(peak.checkpoint.step),
            _number(peak.checkpoint.mean("kl"), ".2f"),
            f"{peak.interval.value:.1%} ({peak.interval.low:.1%} to {peak.interval.high:.1%})",
            f"{peak.cross_fitted:.1%}",
            _number(peak.checkpoint.mean("rubric"), ".3f"),
        )
        for peak in peaks
    ]
    return _Table(headers, rows)


def _judges_table(judges: Iterable[JudgeFacts]) -> _Table:
    headers = ("Seed", "Golden: held-out labels", "Golden: noiseless rubric", "Proxy: training", "Proxy: validation")
    rows = [
        (
            str(facts.seed),
            _number(facts.golden_accuracy, ".1%"),
            _number(facts.golden_rubric_agreement, ".1%"),
            _number(facts.proxy_train_accuracy, ".1%"),
            _number(facts.proxy_validation_accuracy, ".1%"),
        )
        for facts in judges
    ]
    return _Table(headers, rows)


def _arms_table(arms: object) -> _Table:
    """Arms as rows over the union of their settings."""
    if isinstance(arms, Mapping):
        arms = [
            {"arm": name, **(dict(_flat(arm)) if isinstance(arm, Mapping) else {"": arm})} for name, arm in arms.items()
        ]
    if not isinstance(arms, Sequence) or isinstance(arms, str):
        return _Table((), ())
    flat = [dict(_flat(arm)) for arm in arms if isinstance(arm, Mapping)]
    headers = list(dict.fromkeys(name for arm in flat for name in arm))
    return _Table(
        [name.replace("_", " ") for name in headers], [[arm.get(name, "") for name in headers] for arm in flat]
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Settings by dotted name, values as text."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{name}", ", ".join(map(_text, value))
        else:
            yield f"{prefix}{name}", _text(value)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:g}"
    return str(value)


def _by_prompt(samples: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The responses under the prompt they answer, in order of appearance."""
    prompts: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        prompts.setdefault(sample["prompt"], []).append({"rubric": None, **sample, "loss": loss_name(sample["loss"])})
    return list(prompts.items())


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None or math.isnan(value) else format(value, form)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
