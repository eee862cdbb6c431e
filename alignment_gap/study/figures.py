"""The figures of the controlled study: one Vega-Lite specification each, for the page and for the PNG.

A figure carries the sentences that its numbers support; a figure whose arms or metrics are missing says so instead.
Colours and shapes belong to arms and are the same in every figure; they keep apart for colour-blind eyes.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from alignment_gap.errors import UserError
from alignment_gap.study import analysis, findings
from alignment_gap.study.analysis import ORIGIN, Band, CheckpointResult, Comparison, Method, loss_name
from alignment_gap.study.findings import Finding

try:
    import altair as alt
    import vl_convert
except ImportError as error:
    raise UserError(f"{error.name} draws the report and is not installed: pip install alignment-gap[study]") from error

PAIRS = (("online", "offline"), ("online", "shuffled"), ("shuffled", "offline"))
ARM_STYLES = {
    "online": ("#0072B2", "circle"),
    "offline": ("#E69F00", "square"),
    "shuffled": ("#009E73", "triangle-up"),
    "golden": ("#8C8C8C", "diamond"),
    ORIGIN: ("#5A5A5A", "cross"),
}
_SPARE_STYLES = (
    ("#CC79A7", "triangle-down"),
    ("#56B4E9", "triangle-right"),
    ("#D55E00", "triangle-left"),
    ("#7B4FA3", "wedge"),
    ("#B8A000", "arrow"),
)
_UNTRAINED = (ORIGIN, "golden")
_KL_TICKS = (0, 0.1, 0.3, 1, 2, 4, 6, *(k * 2**power for power in range(10) for k in (8, 12)))
_PLOTTED = ("kl", "win_rate", "rubric", "accuracy", "chosen_log_ratio", "rejected_log_ratio")
_PERCENT = frozenset({"win_rate", "accuracy"})
_AXES = {
    "kl": "KL to SFT (nats, square-root scale)",
    "win_rate": "Win rate against the golden policy",
    "rubric": "Rubric score (true quality)",
    "accuracy": "Accuracy on D_golden",
    "chosen_log_ratio": "Winner: log-prob. relative to SFT (nats)",
    "rejected_log_ratio": "Loser: log-prob. relative to SFT (nats)",
    "step": "Gradient steps",
}
_NAMES = {"win_rate": "golden win rate", "rubric": "rubric score"}
INK = "#606060"
LINE = "#999999"
GRID = "#E4E4E4"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
      name: stem of the PNG's file name.
      title: what is plotted, with the number of the figure in the paper.
      findings: what it shows and whether that agrees with the paper.
      spec: Vega-Lite with its data inside; empty where the figure cannot be drawn.
      missing: why it cannot be drawn.
    """

    name: str
    title: str
    findings: tuple[Finding, ...] = ()
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""

    def png(self, scale: float = 2.0) -> bytes:
        """The drawing as a PNG on white."""
        return vl_convert.vegalite_to_png(self.spec, scale=scale)


def study_figures(
    results: Sequence[CheckpointResult], table: Sequence[Row], comparisons: Sequence[Comparison]
) -> list[Figure]:
    """All figures, in the order of the report; those that lack their numbers come with a reason instead of a drawing.

    Args:
      results: every checkpoint of the study.
      table: their rows, as from `analysis.results_table`.
      comparisons: as from `study_comparisons`.
    """
    rows = [_row(result, means) for result, means in zip(results, table, strict=True)]
    study = _Study(results, rows, comparisons)
    losses = study_losses(results)
    lead = losses[0] if losses else "ipo"
    figures = [_budget_figure(study, loss) for loss in losses or [lead]]
    figures += [
        _kl_figure(study, "figure_4", "Figures 1 and 4", lead, "win_rate"),
        _kl_figure(study, "figure_4_rubric", "As figure 4, true quality", lead, "rubric"),
        _accuracy_figure(study, losses),
        *(_training_figure(study, loss) for loss in losses),
    ]
    for loss in losses[1:]:
        name = f"figure_9_{loss}"
        figures += [
            _kl_figure(study, name, "Figure 9", loss, "win_rate", behind=lead),
            _kl_figure(study, f"{name}_rubric", "As figure 9, true quality", loss, "rubric", behind=lead),
        ]
    return figures


def study_losses(results: Sequence[CheckpointResult]) -> list[str]:
    """The losses of the trained arms, IPO first."""
    losses = dict.fromkeys(loss for arm, loss in analysis.methods(results) if arm not in _UNTRAINED)
    return sorted(losses, key=lambda loss: loss != "ipo")


def study_comparisons(results: Sequence[CheckpointResult]) -> list[Comparison]:
    """Every pair of `PAIRS` that was measured, under every loss, by win rate and by rubric."""
    triples = itertools.product(study_losses(results), ("win_rate", "rubric"), PAIRS)
    found = (analysis.compare(results, (a, loss), (b, loss), metric) for loss, metric, (a, b) in triples)
    return [comparison for comparison in found if comparison is not None]


# Data.


@dataclasses.dataclass(frozen=True)
class _Study:
    """What every figure draws from: the checkpoints, a chart row for each, and the comparisons at equal KL."""

    results: Sequence[CheckpointResult]
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]

    def select(self, loss: str, metrics: Sequence[str], *, origins: bool = True) -> list[Row]:
        """Rows that have all the metrics: of a loss, and by default of the origin and of the golden policy."""
        return [
            row
            for result, row in zip(self.results, self.rows, strict=True)
            if all(metric in row for metric in metrics)
            and ((origins and result.arm in _UNTRAINED) or (result.loss == loss and result.arm not in _UNTRAINED))
        ]

    def lacking(self, loss: str, metrics: Sequence[str]) -> str:
        """Why a figure of a loss and these metrics cannot be drawn; empty where it can."""
        trained = [result for result in self.results if result.loss == loss and result.arm not in _UNTRAINED]
        if not trained:
            return f"no arm was trained with {loss_name(loss)}"
        absent = [metric for metric in metrics if not any(metric in result.outcomes for result in trained)]
        return f"not measured: {', '.join(absent)}" if absent else ""


def _row(result: CheckpointResult, means: Row) -> Row:
    """A checkpoint as a row of a chart: what identifies it, means and interval ends that are finite."""
    row: Row = {
        "arm": result.arm,
        "loss": loss_name(result.loss),
        "run": f"{result.arm} {result.loss} {result.setting} seed {result.seed}",
        "setting": "" if result.arm == ORIGIN else result.setting,
        "seed": result.seed,
        "step": result.step,
    }
    columns = [f"{metric}{end}" for metric in _PLOTTED for end in ("", "_low", "_high")]
    row |= {name: round(means[name], 5) for name in columns if math.isfinite(means[name])}
    return row | {f"{metric}_text": _text(means, metric) for metric in analysis.METRICS if math.isfinite(means[metric])}


def _text(means: Row, metric: str) -> str:
    """A mean with its interval, for the tooltip."""
    form = ".1%" if metric in analysis.PROPORTIONS else ".3g"
    value, low, high = (format(means[f"{metric}{end}"], form) for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def _with_starts(rows: Sequence[Row]) -> list[Row]:
    """The rows, and for the lines the origin of each seed again as the start of each of its runs.

    The arms with the most checkpoints come first, to be drawn below the others.
    """
    origins = {row["seed"]: row for row in rows if row["arm"] == ORIGIN}
    runs = {row["run"]: row for row in rows if row["arm"] != ORIGIN and row["seed"] in origins}
    starts = [{**origins[row["seed"]], "run": run, "arm": row["arm"], "start": True} for run, row in runs.items()]
    counts = collections.Counter(row["arm"] for row in rows)
    return starts + sorted(rows, key=lambda row: (row["arm"] == ORIGIN, -counts[row["arm"]]))


# Encodings.


def _styles(rows: Sequence[Row]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of the arms, the known ones first and always alike."""
    arms = {row["arm"] for row in rows}
    ordered = [arm for arm in ARM_STYLES if arm in arms] + sorted(arms - set(ARM_STYLES))
    spare = itertools.cycle(_SPARE_STYLES)
    colours, shapes = zip(*(ARM_STYLES.get(arm) or next(spare) for arm in ordered), strict=True)
    legend = alt.Legend(title=None, symbolOpacity=1)
    return (
        alt.Color("arm:N", scale=alt.Scale(domain=ordered, range=colours), legend=legend),
        alt.Shape("arm:N", scale=alt.Scale(domain=ordered, range=shapes), legend=legend),
    )


def _x(field: str, rows: Sequence[Row] = ()) -> alt.X:
    if field != "kl":
        scale = alt.Scale(zero=False, nice=False, padding=12)
        return alt.X(f"{field}:Q", title=_AXES[field], scale=scale, axis=_ticks(field))
    largest = max((row["kl"] for row in rows), default=1.0)
    ticks = [tick for tick in _KL_TICKS if tick <= 1.05 * largest]
    scale = alt.Scale(type="sqrt", domainMin=0, domainMax=1.05 * largest, nice=False)
    return alt.X("kl:Q", title=_AXES["kl"], scale=scale, axis=alt.Axis(values=ticks, format="~g"))


def _budget_axis() -> alt.X:
    """The range of the budgets, which may lie far from 0, on a square-root scale."""
    scale = alt.Scale(type="sqrt", zero=False, nice=False, padding=8)
    title = "KL budget (nats, square-root scale)"
    return alt.X("budget:Q", title=title, scale=scale, axis=alt.Axis(format="~g", tickCount=6))


def _y(field: str, end: str = "") -> alt.Y:
    return alt.Y(f"{field}{end}:Q", title=_AXES[field], scale=alt.Scale(zero=False), axis=_ticks(field))


def _ticks(field: str) -> alt.Axis:
    return alt.Axis(format=".0%", tickCount=6) if field in _PERCENT else alt.Axis()


def _tooltip(rows: Sequence[Row]) -> list[alt.Tooltip]:
    """Everything known of a checkpoint: its identity, and each measured mean with its interval."""
    tips = [alt.Tooltip(f"{field}:N") for field in ("arm", "loss", "setting", "seed", "step")]
    for metric in analysis.METRICS:
        if any(f"{metric}_text" in row for row in rows):
            tips.append(alt.Tooltip(f"{metric}_text:N", title=metric.replace("_", " ")))
    return tips


def _scatter(rows: Sequence[Row], x: alt.X, metric: str, *, lines: bool = True) -> list[alt.Chart]:
    """Faint lines along the runs, thin bars for the intervals, and a mark with a tooltip for each checkpoint.

    The data are those of the chart that the layers end up in; rows marked `behind` are drawn in lighter marks.
    """
    colour, shape = _styles(rows)
    paths = alt.Chart().mark_line(strokeWidth=1, opacity=0.35).transform_filter("!datum.behind")
    points = alt.Chart().transform_filter("!datum.start")
    strength = alt.condition("datum.behind", alt.value(0.2), alt.value(0.9))
    bars = points.mark_rule(strokeWidth=1).encode(x, _y(metric, "_low"), alt.Y2(f"{metric}_high:Q"), colour)
    marks = points.mark_point(filled=True, size=55, strokeWidth=0).encode(x, _y(metric), colour, shape)
    return [
        *([paths.encode(x, _y(metric), colour, alt.Detail("run:N"), alt.Order("step:Q"))] if lines else []),
        bars.encode(opacity=alt.condition("datum.behind", alt.value(0.15), alt.value(0.45))),
        marks.encode(opacity=strength, tooltip=_tooltip(rows)),
    ]


def _level(value: float) -> alt.Chart:
    """A dashed line across the chart, on the y axis of win rates and gaps alike."""
    base = alt.Chart(alt.Data(values=[{"win_rate": value, "value": value}]))
    return base.mark_rule(strokeDash=[4, 4], color=LINE).encode(alt.Y("value:Q"))


def _finish(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The specification in the report's look; the page turns its greys over for a dark screen."""
    text: Row = {"labelColor": INK, "titleColor": INK, "labelFontSize": 12, "titleFontSize": 13}
    text["titleFontWeight"] = "normal"
    lines: Row = {"labelFlush": False, "gridColor": GRID, "domainColor": LINE, "tickColor": LINE, "titlePadding": 10}
    config: Row = {
        "font": "Helvetica, Arial, sans-serif",
        "background": "white",
        "padding": 8,
        "axis": text | lines,
        "legend": text | {"symbolSize": 90, "orient": "top", "direction": "horizontal", "symbolOpacity": 1},
        "view": {"stroke": None},
        "title": {"color": INK, "fontSize": 13, "fontWeight": "normal", "anchor": "start"},
    }
    return chart.to_dict() | {"config": config}


# Figures.


def _kl_figure(study: _Study, name: str, number: str, loss: str, metric: str, behind: str = "") -> Figure:
    """A metric over KL to SFT for the arms of one loss, those of another behind it in lighter marks."""
    title = f"{number}: {_NAMES[metric]} over KL to SFT, {loss_name(loss)}"
    if reason := study.lacking(loss, ("kl", metric)):
        return Figure(name, title, missing=reason)
    rows = study.select(loss, ("kl", metric))
    if behind:
        title += f" ({loss_name(behind)} behind it, lighter)"
        rows += [row | {"behind": True} for row in study.select(behind, ("kl", metric), origins=False)]
    layers = _scatter(rows, _x("kl", rows), metric)
    if metric == "win_rate":
        layers.insert(0, _level(0.5).encode(_y(metric)))
    chart = alt.layer(*layers, data=alt.Data(values=_with_starts(rows))).properties(width=760, height=420)
    return Figure(name, title, _kl_findings(study, loss, metric), _finish(chart))


def _kl_findings(study: _Study, loss: str, metric: str) -> tuple[Finding, ...]:
    """What the figure shows beyond the win rates of online and offline at equal KL, which have their own figure."""
    shown = [c for c in study.comparisons if c.metric == metric and c.first[1] == loss]
    if metric == "win_rate":
        shown = [c for c in shown if (c.first[0], c.second[0]) != PAIRS[0]]
    branches: list[Method] = [("online", loss), ("offline", loss)]
    found = [*map(findings.equal_kl_finding, shown), findings.fall_finding(study.results, branches, metric)]
    if metric == "rubric":
        found += [findings.over_optimisation_finding(study.results, branch) for branch in branches]
    return tuple(finding for finding in found if finding)


def _budget_figure(study: _Study, loss: str) -> Figure:
    """The best win rate of online and of offline within each KL budget, and their gap."""
    name, title = f"equal_kl_{loss}", f"The question: best win rate within a KL budget, {loss_name(loss)}"
    pair = (("online", loss), ("offline", loss))
    found = [c for c in study.comparisons if c.metric == "win_rate" and (c.first, c.second) == pair]
    if not found:
        return Figure(
            name, title, missing="it needs checkpoints of online, of offline and of SFT, with KL and win rate"
        )
    comparison = found[0]
    said = (findings.equal_kl_finding(comparison),)
    if len(comparison.budgets) < 2:
        return Figure(name, title, said, missing="the checkpoints of online and of offline share no range of KL")
    frontiers = [
        *_band_rows(comparison, comparison.first_frontier, "online"),
        *_band_rows(comparison, comparison.second_frontier, "offline"),
    ]
    x = _budget_axis()
    left = _band_chart(frontiers, x, _AXES["win_rate"], "%").encode(_styles(frontiers)[0])
    gap = _band_chart(
        _band_rows(comparison, comparison.gap, "online minus offline"), x, "Gap, online minus offline", ""
    )
    right = alt.layer(_level(0.0), gap.encode(color=alt.value(INK)))
    chart = alt.hconcat(*(side.properties(width=375, height=300) for side in (left, right)))
    return Figure(name, title, said, _finish(chart))


def _band_rows(comparison: Comparison, band: Band, arm: str) -> list[Row]:
    """A row per budget, proportions in per cent."""
    columns = zip(comparison.budgets, 100 * band.value, 100 * band.low, 100 * band.high, strict=True)
    names = ("budget", "value", "low", "high")
    return [{"arm": arm} | dict(zip(names, (round(float(v), 4) for v in row), strict=True)) for row in columns]


def _band_chart(rows: Sequence[Row], x: alt.X, title: str, unit: str) -> alt.LayerChart:
    """Estimates as a line over their intervals as a band."""
    base = alt.Chart(alt.Data(values=list(rows))).encode(x)
    scale, unit = alt.Scale(zero=False), f" ({unit or 'percentage points'})"
    tips = [alt.Tooltip(f"{field}:Q", format=".2f") for field in ("budget", "value", "low", "high")]
    band = base.mark_area(opacity=0.2).encode(alt.Y("low:Q", title=title + unit, scale=scale), alt.Y2("high:Q"))
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=16))
    return alt.LayerChart(layer=[band, line.encode(alt.Y("value:Q", title=title + unit), tooltip=["arm:N", *tips])])


def _accuracy_figure(study: _Study, losses: Sequence[str]) -> Figure:
    """Win rate over classification accuracy, every checkpoint, a panel per loss."""
    name, title, metrics = "figure_7", "Figure 7: win rate over accuracy on D_golden", ("win_rate", "accuracy")
    drawn = [loss for loss in losses if not study.lacking(loss, metrics)]
    if not drawn:
        return Figure(name, title, missing="not measured together: win_rate, accuracy")
    selected = {loss: study.select(loss, metrics) for loss in drawn}
    everything = [row for rows in selected.values() for row in rows]
    panels = [
        alt.layer(
            *_scatter(everything, _x("accuracy"), "win_rate", lines=False), data=alt.Data(values=_with_starts(rows))
        ).properties(width=375, height=320, title=loss_name(loss))
        for loss, rows in selected.items()
    ]
    found = tuple(findings.prediction_finding(study.results, ("offline", loss)) for loss in drawn)
    return Figure(name, title, found, _finish(alt.concat(*panels, columns=2)))


def _training_figure(study: _Study, loss: str) -> Figure:
    """Accuracy and the log-probabilities of winner and loser along training."""
    name, title = f"figure_8_{loss}", f"Figure 8: classification along training, {loss_name(loss)}"
    metrics = ("accuracy", "chosen_log_ratio", "rejected_log_ratio")
    if reason := study.lacking(loss, metrics):
        return Figure(name, title, missing=reason)
    rows = [row for row in study.select(loss, metrics) if row["arm"] != "golden"]
    panels = [alt.layer(*_scatter(rows, _x("step"), metric)).properties(width=235, height=260) for metric in metrics]
    found = (findings.final_accuracy_finding(study.results, loss), findings.log_ratio_finding(study.results, loss))
    chart = alt.hconcat(*panels, data=alt.Data(values=_with_starts(rows)))
    return Figure(name, title, tuple(finding for finding in found if finding), _finish(chart))
