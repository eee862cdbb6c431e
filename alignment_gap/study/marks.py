"""A figure of a report, and how checkpoints are drawn in it: axes, marks, legends and tooltips.

Every arm has one colour and shape in all figures; colour-blind readers can tell them apart. If the runs of a figure
differ in a setting, this setting is visible and has a legend: a larger beta fills a mark, a larger learning rate makes
it larger, and more steps make the line of a run broken.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from alignment_gap.evaluation import charts
from alignment_gap.evaluation.intervals import Interval
from alignment_gap.study import analysis, findings
from alignment_gap.study.analysis import METRICS, ORIGIN, PROXY, CheckpointResult, loss_name
from alignment_gap.study.arms import GOLDEN, Arm
from alignment_gap.study.claims import Answer

# Colours and shapes besides those of arms: the SFT policy, where every run starts, and the proxy.
OTHER_STYLES = {ORIGIN: ("#5A5A5A", "cross"), PROXY[0]: (charts.INK, "stroke")}
# The settings in which runs may differ: fields, and words in legends.
SETTINGS = {"beta": "beta", "rate": "learning rate", "steps": "steps"}
WIDTH, HEIGHT = 520, 330
_FILLED = (0.05, 1.0)
_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of a report.

    Attributes:
      name: the PNG's file name without its suffix.
      title: what is plotted, with the number of the figure in the paper.
      question: the question that it answers.
      paper: what the paper saw.
      answers: the study's answers to the claims about the figure.
      sentences: what this study sees.
      spec: Vega-Lite specification with its data; empty if the figure cannot be drawn.
      missing: why it cannot be drawn.
    """

    name: str
    title: str
    question: str = ""
    paper: str = ""
    answers: tuple[Answer, ...] = ()
    sentences: tuple[str, ...] = ()
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether it has several panels; it then takes the whole width of the page."""
        return bool(self.spec.keys() & {"hconcat", "concat"})

    def png(self) -> bytes:
        """The drawing as a PNG on white."""
        return charts.png(self.spec)

    def _repr_png_(self) -> bytes | None:
        """The picture for a notebook."""
        return None if self.missing else self.png()


# Data.


def chart_row(result: CheckpointResult, means: Mapping[str, Any]) -> Row:
    """A checkpoint as a row of a chart: its identity, and all finite means and ends of intervals."""
    row: Row = {
        "arm": result.arm,
        "loss": loss_name(result.loss),
        "run": f"{result.arm} {result.loss} {result.setting} seed {result.seed}",
        "setting": result.setting,
        "seed": result.seed,
        "step": result.step,
    }
    row |= setting_fields(result.beta, result.learning_rate, result.steps_factor)
    columns = analysis.COLUMNS[len(analysis.IDENTITY) :]
    row |= {name: round(means[name], 5) for name in columns if math.isfinite(means[name])}
    for metric in METRICS:
        if metric in row:
            interval = Interval(*(means[f"{metric}{end}"] for end in ("", "_low", "_high")))
            row[f"{metric}_text"] = findings.level(interval, metric)
    return row


def setting_fields(beta: float, learning_rate: float, steps_factor: int) -> Row:
    """The settings of a run in the words of legends; settings that it does not have are left out."""
    if math.isnan(learning_rate):
        return {}
    words = {"beta": f"{beta:g}", "rate": f"{learning_rate:g}", "steps": f"{steps_factor}x"}
    return {name: word for name, word in words.items() if word != "nan"}


def with_starts(rows: Sequence[Row]) -> list[Row]:
    """The rows, with the origin of each seed repeated at the start of each of its runs, so that lines begin there.

    The arms with the most checkpoints come first, so that they are drawn below the others.
    """
    origins = {row["seed"]: row for row in rows if row["arm"] == ORIGIN}
    runs = {row["run"]: row for row in rows if row["arm"] != ORIGIN and row["seed"] in origins}
    starts = [
        {**origins[row["seed"]], "run": run, "arm": row["arm"], "start": True}
        | {name: row[name] for name in SETTINGS if name in row}
        for run, row in runs.items()
    ]
    counts = collections.Counter(row["arm"] for row in rows)
    return starts + sorted(rows, key=lambda row: (row["arm"] == ORIGIN, -counts[row["arm"]]))


def seeds_as_one(rows: Sequence[Row], metrics: Sequence[str]) -> list[Row]:
    """One row for the seeds of a setting: metrics are means, and intervals go from the lowest seed to the highest.

    The rows of a single seed stay as they are, with the intervals of their checkpoints.
    """
    if len({row["seed"] for row in rows}) < 2:
        return list(rows)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in ("arm", "loss", "setting", "step")), []).append(row)
    return [_mean_row(group, metrics) for group in groups.values()]


def _mean_row(group: Sequence[Row], metrics: Sequence[str]) -> Row:
    first = group[0]
    kept = {name: first[name] for name in ("arm", "loss", "setting", "step", *SETTINGS) if name in first}
    row = kept | {"run": f"{first['arm']} {first['loss']} {first['setting']}", "seed": "mean", "seeds": len(group)}
    for metric in metrics:
        if values := [each[metric] for each in group if metric in each]:
            spread = Interval(float(np.mean(values)), min(values), max(values))
            ends = zip(("", "_low", "_high"), (spread.value, spread.low, spread.high), strict=True)
            row |= {f"{metric}{end}": round(value, 5) for end, value in ends}
            row[f"{metric}_text"] = f"{findings.level(spread, metric)} by seed"
    return row


# Encodings.


def styles(rows: Sequence[Row], arms: Sequence[Arm]) -> tuple[alt.Color, alt.Fill, alt.Shape]:
    """Colour, fill and shape of the arms, in the order of the table; the same in all figures."""
    known = {arm.name: (arm.colour, arm.shape) for arm in (*arms, GOLDEN)} | OTHER_STYLES
    drawn = {row["arm"] for row in rows}
    ordered = [name for name in known if name in drawn]
    colours, shapes = zip(*(known[name] for name in ordered), strict=True)
    legend = alt.Legend(title=None)
    return (
        alt.Color("arm:N", scale=alt.Scale(domain=ordered, range=colours), legend=legend),
        alt.Fill("arm:N", scale=alt.Scale(domain=ordered, range=colours), legend=legend),
        alt.Shape("arm:N", scale=alt.Scale(domain=ordered, range=shapes), legend=legend),
    )


def axis(channel: Any, metric: str, end: str = "", **scale: Any) -> Any:
    """A channel for the mean of a metric, or for an end of its interval; fractions in per cent."""
    words, _, unit, _, is_share = METRICS[metric]
    title = f"{words[0].upper()}{words[1:]}{f' ({unit.strip()})' if unit and not is_share else ''}"
    ticks = alt.Axis(format=".0%", tickCount=6) if is_share else alt.Axis()
    return channel(f"{metric}{end}:Q", title=title, scale=alt.Scale(zero=False, **scale), axis=ticks)


def tooltip(rows: Sequence[Row]) -> list[alt.Tooltip]:
    """The tooltip of a checkpoint: its identity, and each measured mean with its interval."""
    shown = ("arm", "loss", "setting", "seeds" if any("seeds" in row for row in rows) else "seed", "step")
    tips = [alt.Tooltip(f"{field}:N") for field in shown]
    for metric in METRICS:
        if any(f"{metric}_text" in row for row in rows):
            tips.append(alt.Tooltip(f"{metric}_text:N", title=metric.replace("_", " ")))
    return tips


def scatter(rows: Sequence[Row], arms: Sequence[Arm], x: alt.X, metric: str, *, lines: bool = True) -> list[alt.Chart]:
    """Faint lines along the runs, thin bars for the intervals, and a mark with a tooltip for each checkpoint.

    The layers use the data of the chart that they are added to. Rows marked `behind` have lighter marks.
    """
    colour, fill, shape = styles(rows, arms)
    paths = alt.Chart().mark_line(strokeWidth=1, opacity=0.4).transform_filter("!datum.behind")
    points = alt.Chart().transform_filter("!datum.start")
    strength = alt.condition("datum.behind", alt.value(0.2), alt.value(0.9))
    y, low, high = axis(alt.Y, metric), axis(alt.Y, metric, "_low"), alt.Y2(f"{metric}_high:Q")
    bars = points.mark_rule(strokeWidth=1).encode(x, low, high, colour)
    marks = points.mark_point(size=55, strokeWidth=1).encode(x, y, colour, fill, shape)
    return [
        *([paths.encode(x, y, colour, alt.Detail("run:N"), alt.Order("step:Q"), **dashes(rows))] if lines else []),
        bars.encode(opacity=alt.condition("datum.behind", alt.value(0.12), alt.value(0.4))),
        marks.encode(opacity=strength, tooltip=tooltip(rows), **_setting_marks(rows)),
        *_legend_of_fill(rows),
    ]


def over_kl(
    rows: Sequence[Row], arms: Sequence[Arm], metric: str, among: Sequence[Row] | None = None
) -> alt.LayerChart | alt.FacetChart:
    """Checkpoints over KL to SFT, with a line at 50 % if the metric is the win rate.

    Axes and legends are those of the rows `among`, if the chart is one of several panels.
    """
    among = rows if among is None else among
    layers = scatter(among, arms, charts.kl_axis(max(row["kl"] for row in among)), metric)
    if metric == "win_rate":
        layers.insert(0, level(0.5).encode(axis(alt.Y, metric)))
    return alt.layer(*layers, data=alt.Data(values=with_starts(rows))).properties(width=WIDTH, height=HEIGHT)


def kl_panels(panels: Mapping[str, Sequence[Row]], arms: Sequence[Arm], metric: str) -> alt.ConcatChart:
    """A panel of checkpoints over KL for each title, all on the same axes."""
    among = [row for rows in panels.values() for row in rows]
    drawn = [over_kl(rows, arms, metric, among).properties(title=title) for title, rows in panels.items()]
    return alt.concat(*drawn, columns=2).resolve_scale(x="shared", y="shared")


def level(value: float) -> alt.Chart:
    """A dashed horizontal line across the chart, for win rates and for gaps."""
    base = alt.Chart(alt.Data(values=[{"win_rate": value, "value": value}]))
    return base.mark_rule(strokeDash=[4, 4], color=charts.LINE).encode(alt.Y("value:Q"))


def estimates(chart: alt.Chart, words: str, names: Sequence[str]) -> alt.LayerChart:
    """Marks at the field value, a bar from low to high for each interval, and a dashed line at 0; all along x.

    Args:
      chart: the rows, with their positions along y and their colours.
      words: the title of the x axis.
      names: fields that the tooltip shows before the numbers.
    """
    x = alt.X("value:Q", title=words)
    bars = chart.mark_rule(strokeWidth=1.5).encode(alt.X("low:Q", title=words), alt.X2("high:Q"))
    tips = [
        *(f"{name}:N" for name in names),
        *(alt.Tooltip(f"{end}:Q", format=".3~r") for end in ("value", "low", "high")),
    ]
    marks = chart.mark_point(filled=True, size=65).encode(x, tooltip=tips)
    zero = alt.Chart(alt.Data(values=[{"value": 0}])).mark_rule(strokeDash=[4, 4], color=charts.LINE)
    return alt.LayerChart(layer=[zero.encode(x), bars, marks])


def dashes(rows: Sequence[Row], field: str = "steps") -> dict[str, Any]:
    """The dashes of lines by a setting, if the rows differ in it."""
    values = _values(rows, field)
    if len(values) < 2:
        return {}
    dashed = [_DASHES[i % len(_DASHES)] for i in range(len(values))]
    legend = alt.Legend(title=SETTINGS[field], symbolType="stroke", symbolStrokeColor=charts.INK)
    scale = alt.Scale(domain=values, range=dashed)
    return {"strokeDash": alt.StrokeDash(f"{field}:N", scale=scale, legend=legend)}


def strokes(rows: Sequence[Row]) -> dict[str, Any]:
    """The dashes of curves by the learning rate, and their opacity by beta, if the rows differ in these."""
    found = dashes(rows, "rate")
    if len(values := _values(rows, "beta")) > 1:
        legend = alt.Legend(title=SETTINGS["beta"], symbolType="stroke", symbolStrokeColor=charts.INK)
        by_value = alt.Opacity("beta:N", scale=_scale(values, 0.35, 1.0), legend=legend)
        found["opacity"] = alt.condition("!isValid(datum.beta)", alt.value(1.0), by_value)
    return found


def _setting_marks(rows: Sequence[Row]) -> dict[str, Any]:
    """The fill of marks by beta, and their size by the learning rate, if the rows differ in these."""
    found: dict[str, Any] = {}
    if len(betas := _values(rows, "beta")) > 1:
        by_beta = alt.FillOpacity("beta:N", scale=_scale(betas, *_FILLED))
        found["fillOpacity"] = alt.condition("!isValid(datum.beta)", alt.value(1.0), by_beta)
    if len(rates := _values(rows, "rate")) > 1:
        legend = alt.Legend(title=SETTINGS["rate"], symbolFillColor=charts.INK, symbolStrokeColor=charts.INK)
        by_rate = alt.Size("rate:N", scale=_scale(rates, 30.0, 120.0), legend=legend)
        found["size"] = alt.condition("!isValid(datum.rate)", alt.value(55.0), by_rate)
    return found


def _legend_of_fill(rows: Sequence[Row]) -> list[alt.Chart]:
    """A layer without marks for the legend of beta, because Vega has no legend for the opacity of fills."""
    if len(betas := _values(rows, "beta")) < 2:
        return []
    legend = alt.Legend(title=SETTINGS["beta"], symbolFillColor=charts.INK, symbolStrokeColor=charts.INK)
    by_beta = alt.Opacity("beta:N", scale=_scale(betas, 0.2, 1.0), legend=legend)
    return [alt.Chart().mark_point(filled=True, color=charts.INK).transform_filter("false").encode(by_beta)]


def _scale(values: Sequence[str], low: float, high: float) -> alt.Scale:
    """A scale with equal steps from the first value to the last."""
    return alt.Scale(domain=list(values), range=np.linspace(low, high, len(values)).round(2).tolist())


def _values(rows: Sequence[Row], field: str) -> list[str]:
    """The values of a setting in the rows, ascending; rows with lighter marks are ignored."""
    found = {row[field] for row in rows if field in row and not row.get("behind")}
    return sorted(found, key=lambda word: float(word.removesuffix("x")))
