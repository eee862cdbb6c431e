"""The figures of the controlled study: one Vega-Lite specification each, for the page and for the PNG.

A figure carries the claims of the paper that stand in it, with their answers, and sentences computed from its numbers.
A figure whose arms or metrics are missing says so instead.
Colours and shapes belong to arms and are the same in every figure; they keep apart for colour-blind eyes.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import altair as alt
import numpy as np

from alignment_gap.evaluation import charts
from alignment_gap.evaluation.intervals import Band, Interval
from alignment_gap.study import analysis, findings
from alignment_gap.study.analysis import (
    METRICS,
    OPPONENT,
    ORIGIN,
    PROXY,
    CheckpointResult,
    Comparison,
    Method,
    loss_name,
)
from alignment_gap.study.arms import GOLDEN, MAIN, Arm, file_word
from alignment_gap.study.claims import Answer
from alignment_gap.study.estimates import Evidence

# Colour and shape of the SFT policy, where every run starts.
_ORIGIN_STYLE = ("#5A5A5A", "cross")
_UNTRAINED = (ORIGIN, OPPONENT)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
      name: stem of the PNG's file name.
      title: what is plotted, with the number of the figure in the paper.
      answers: what the study says of the claims that stand in it.
      sentences: what else it shows.
      spec: Vega-Lite with its data inside; empty where the figure cannot be drawn.
      missing: why it cannot be drawn.
    """

    name: str
    title: str
    answers: tuple[Answer, ...] = ()
    sentences: tuple[str, ...] = ()
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""

    def png(self) -> bytes:
        """The drawing as a PNG on white."""
        return charts.png(self.spec)


def study_figures(
    evidence: Evidence,
    table: Sequence[Row],
    comparisons: Sequence[Comparison],
    answers: Sequence[Answer],
    arms: Sequence[Arm],
) -> list[Figure]:
    """All figures, in the order of the report; those that lack their numbers come with a reason instead of a drawing.

    Args:
      evidence: the checkpoints of the study.
      table: a row for each of them, as from `analysis.results_table`.
      comparisons: as from `findings.study_comparisons`.
      answers: as from `claims.answers`.
      arms: of the study.
    """
    every = zip(evidence.everything, table, strict=True)
    rows = [_row(result, means) for result, means in every if not result.size]
    study = _Study(evidence, rows, comparisons, answers, arms)
    trained = {*analysis.methods(evidence.results)}
    losses = [loss for loss in analysis.losses_of(evidence.results) if trained & {(arm, loss) for arm in study.main}]
    lead = losses[0] if losses else "ipo"
    figures: list[Figure | None] = [_budget_figure(study, loss) for loss in losses or [lead]]
    figures += [
        _kl_figure(study, "figure_4", "Figures 1 and 4", lead, "win_rate", ("1", "4")),
        _kl_figure(study, "figure_4_rubric", "As figure 4, true quality", lead, "rubric"),
        _accuracy_figure(study, losses),
        *(_training_figure(study, loss) for loss in losses),
        *([_online_data_figure(study, lead)] if any("stream_accuracy" in row for row in study.rows) else []),
    ]
    for loss in losses[1:]:
        name = f"figure_9_{file_word(loss)}"
        figures += [
            _kl_figure(study, name, "Figure 9", loss, "win_rate", ("9",) if loss == "best_of_n" else (), behind=lead),
            _kl_figure(study, f"{name}_rubric", "As figure 9, true quality", loss, "rubric", behind=lead),
        ]
    if len(evidence.sizes) > 1:
        figures.append(_scale_figure(study, lead))
    if len(losses) > 2:
        figures.append(_gaps_figure(study))
    panels = dict.fromkeys(arm.panel for arm in arms if arm.panel != MAIN)
    figures += [_panel_figure(study, panel, metric) for panel in panels for metric in ("win_rate", "rubric")]
    return [figure for figure in figures if figure is not None]


def main_arms(arms: Sequence[Arm]) -> list[str]:
    """The names of the arms of the main figures."""
    return [arm.name for arm in arms if arm.panel == MAIN]


# Data.


@dataclasses.dataclass(frozen=True)
class _Study:
    """What every figure draws from: the checkpoints, a chart row for each, comparisons, answers to claims, the arms."""

    evidence: Evidence
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    answers: Sequence[Answer]
    arms: Sequence[Arm]

    def claims(self, *figures: str) -> tuple[Answer, ...]:
        """The answers to the claims that stand in these figures of the paper."""
        return tuple(answer for answer in self.answers if answer.claim.figure in figures)

    @property
    def main(self) -> list[str]:
        """The arms of the main figures."""
        return main_arms(self.arms)

    def select(self, loss: str, metrics: Sequence[str], *, origins: bool = True) -> list[Row]:
        """Rows with all the metrics: of the main arms under a loss, by default of origin and golden policy too."""
        methods = {(arm, loss_name(loss)) for arm in self.main}
        return self.of_methods(methods, metrics, origins=origins)

    def of_methods(
        self, methods: Collection[tuple[str, str]], metrics: Sequence[str], *, origins: bool = True
    ) -> list[Row]:
        """Rows of methods, each an arm and the words of a loss, that have all the metrics."""
        measured = [row for row in self.rows if all(metric in row for metric in metrics)]
        return [
            row for row in measured if (origins if row["arm"] in _UNTRAINED else (row["arm"], row["loss"]) in methods)
        ]

    def lacking(self, loss: str, metrics: Sequence[str]) -> str:
        """Why a figure of a loss and these metrics cannot be drawn; empty where it can."""
        trained = self.select(loss, (), origins=False)
        if not trained:
            return f"no arm was trained with {loss_name(loss)}"
        absent = [metric for metric in metrics if not any(metric in row for row in trained)]
        return f"not measured: {', '.join(absent)}" if absent else ""


def _row(result: CheckpointResult, means: Row) -> Row:
    """A checkpoint as a row of a chart: what identifies it, means and interval ends that are finite."""
    row: Row = {
        "arm": result.arm,
        "loss": loss_name(result.loss),
        "run": f"{result.arm} {result.loss} {result.setting} seed {result.seed}",
        "setting": result.setting,
        "seed": result.seed,
        "step": result.step,
    }
    columns = analysis.COLUMNS[len(analysis.IDENTITY) :]
    row |= {name: round(means[name], 5) for name in columns if math.isfinite(means[name])}
    for metric in METRICS:
        if metric in row:
            interval = Interval(*(means[f"{metric}{end}"] for end in ("", "_low", "_high")))
            row[f"{metric}_text"] = findings.level(interval, metric)
    return row


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


def _styles(rows: Sequence[Row], arms: Sequence[Arm]) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of the arms, in the order of the table and always alike."""
    styles = {arm.name: (arm.colour, arm.shape) for arm in (*arms, GOLDEN)} | {ORIGIN: _ORIGIN_STYLE}
    drawn = {row["arm"] for row in rows}
    ordered = [name for name in styles if name in drawn]
    colours, shapes = zip(*(styles[name] for name in ordered), strict=True)
    legend = alt.Legend(title=None, symbolOpacity=1)
    return (
        alt.Color("arm:N", scale=alt.Scale(domain=ordered, range=colours), legend=legend),
        alt.Shape("arm:N", scale=alt.Scale(domain=ordered, range=shapes), legend=legend),
    )


def _axis(channel: Any, metric: str, end: str = "", **scale: Any) -> Any:
    """A channel of the mean of a metric, or of an end of its interval; shares are in per cent."""
    words, _, unit, _, is_share = METRICS[metric]
    title = f"{words[0].upper()}{words[1:]}{f' ({unit.strip()})' if unit and not is_share else ''}"
    axis = alt.Axis(format=".0%", tickCount=6) if is_share else alt.Axis()
    return channel(f"{metric}{end}:Q", title=title, scale=alt.Scale(zero=False, **scale), axis=axis)


def _tooltip(rows: Sequence[Row]) -> list[alt.Tooltip]:
    """Everything known of a checkpoint: its identity, and each measured mean with its interval."""
    tips = [alt.Tooltip(f"{field}:N") for field in ("arm", "loss", "setting", "seed", "step")]
    for metric in METRICS:
        if any(f"{metric}_text" in row for row in rows):
            tips.append(alt.Tooltip(f"{metric}_text:N", title=metric.replace("_", " ")))
    return tips


def _scatter(study: _Study, rows: Sequence[Row], x: alt.X, metric: str, *, lines: bool = True) -> list[alt.Chart]:
    """Faint lines along the runs, thin bars for the intervals, and a mark with a tooltip for each checkpoint.

    The data are those of the chart that the layers end up in; rows marked `behind` are drawn in lighter marks.
    """
    colour, shape = _styles(rows, study.arms)
    paths = alt.Chart().mark_line(strokeWidth=1, opacity=0.35).transform_filter("!datum.behind")
    points = alt.Chart().transform_filter("!datum.start")
    strength = alt.condition("datum.behind", alt.value(0.2), alt.value(0.9))
    y, low, high = _axis(alt.Y, metric), _axis(alt.Y, metric, "_low"), alt.Y2(f"{metric}_high:Q")
    bars = points.mark_rule(strokeWidth=1).encode(x, low, high, colour)
    marks = points.mark_point(filled=True, size=55, strokeWidth=0).encode(x, y, colour, shape)
    return [
        *([paths.encode(x, y, colour, alt.Detail("run:N"), alt.Order("step:Q"))] if lines else []),
        bars.encode(opacity=alt.condition("datum.behind", alt.value(0.15), alt.value(0.45))),
        marks.encode(opacity=strength, tooltip=_tooltip(rows)),
    ]


def _level(value: float) -> alt.Chart:
    """A dashed line across the chart, on the y axis of win rates and gaps alike."""
    base = alt.Chart(alt.Data(values=[{"win_rate": value, "value": value}]))
    return base.mark_rule(strokeDash=[4, 4], color=charts.LINE).encode(alt.Y("value:Q"))


# Figures.


def _kl_figure(
    study: _Study, name: str, number: str, loss: str, metric: str, claims: Sequence[str] = (), behind: str = ""
) -> Figure:
    """A metric over KL to SFT for the arms of one loss, those of another behind it in lighter marks."""
    title = f"{number}: {METRICS[metric].words} over KL to SFT, {loss_name(loss)}"
    if reason := study.lacking(loss, ("kl", metric)):
        return Figure(name, title, missing=reason)
    rows = study.select(loss, ("kl", metric))
    if behind:
        title += f" ({loss_name(behind)} behind it, lighter)"
        rows += [row | {"behind": True} for row in study.select(behind, ("kl", metric), origins=False)]
    layers = _scatter(study, rows, charts.kl_axis(max(row["kl"] for row in rows)), metric)
    if metric == "win_rate":
        layers.insert(0, _level(0.5).encode(_axis(alt.Y, metric)))
    chart = alt.layer(*layers, data=alt.Data(values=_with_starts(rows))).properties(width=760, height=420)
    return Figure(name, title, study.claims(*claims), _kl_sentences(study, loss, metric), charts.finish(chart))


def _kl_sentences(study: _Study, loss: str, metric: str) -> tuple[str, ...]:
    """What the figure shows beyond the win rates of online and offline at equal KL, which have their own figure."""
    apart = findings.asked(study.comparisons, study.arms)
    of_loss = [c for c in study.comparisons if c.metric == metric and c.first[1] == loss and c not in apart]
    found = [_equal_kl(c) for c in of_loss if c.first[0] in study.main]
    if metric == "rubric":
        branches: list[Method] = [(arm, loss) for arm in findings.question(study.arms)]
        found += [findings.over_optimisation(study.evidence, branch) for branch in branches]
    return tuple(filter(None, found))


def _equal_kl(comparison: Comparison) -> str:
    return f"{findings.equal_kl_headline(comparison)} {findings.equal_kl_detail(comparison)}"


def _panel_figure(study: _Study, panel: str, metric: str) -> Figure | None:
    """A metric over KL for the arms of a panel and those that they are compared with; None without a rubric."""
    word = re.sub(r"\W+", "_", panel.lower()).removeprefix("figures_").removeprefix("figure_")
    name = f"figure_{word}" + ("" if metric == "win_rate" else f"_{metric}")
    title = f"{panel}: {METRICS[metric].words} over KL to SFT"
    arms = {arm.name: arm for arm in study.arms if arm.panel == panel}
    methods = {(r.arm, r.loss) for r in study.evidence.results if r.arm in arms}
    others = {(c.other, c.loss or loss) for arm, loss in methods for c in arms[arm].contrasts}
    drawn = {(arm, loss_name(loss)) for arm, loss in methods | others}
    rows = study.of_methods(drawn, ("kl", metric))
    if not any(row["arm"] in arms for row in rows):
        return None if metric == "rubric" else Figure(name, title, missing=f"not measured: {', '.join(arms)}")
    layers = _scatter(study, rows, charts.kl_axis(max(row["kl"] for row in rows)), metric)
    chart = alt.layer(*layers, data=alt.Data(values=_with_starts(rows))).properties(width=760, height=420)
    said = [_equal_kl(c) for c in study.comparisons if c.metric == metric and c.first[0] in arms]
    claims = study.claims(*re.findall(r"\d+", panel)) if metric == "win_rate" else ()
    return Figure(name, title, claims, tuple(said), charts.finish(chart))


def _gaps_figure(study: _Study) -> Figure:
    """The gap of the study's question at equal KL, a mark for each loss."""
    name, title = "figure_losses", "Is it the loss? The gap at equal KL, by loss"
    asked = [c for c in findings.asked(study.comparisons, study.arms) if len(c.budgets)]
    if not asked:
        return Figure(name, title, missing="no loss has arms that share a range of KL")
    values = [
        {"loss": loss_name(c.first[1]), "gap": 100 * gap.value, "low": 100 * gap.low, "high": 100 * gap.high}
        for c in asked
        for gap in [c.mean_gap]
    ]
    base = alt.Chart(alt.Data(values=values)).encode(alt.Y("loss:N", title=None, sort=None))
    words = f"{asked[0].first[0]} minus {asked[0].second[0]}, win rate (percentage points)"
    x = alt.X("gap:Q", title=words)
    bars = base.mark_rule(strokeWidth=1.5).encode(alt.X("low:Q", title=words), alt.X2("high:Q"))
    marks = base.mark_point(filled=True, size=70).encode(x, tooltip=["loss:N", "gap:Q", "low:Q", "high:Q"])
    zero = alt.Chart(alt.Data(values=[{"gap": 0}])).mark_rule(strokeDash=[4, 4], color=charts.LINE)
    chart = alt.layer(zero.encode(alt.X("gap:Q")), bars, marks).properties(width=620, height=34 * len(values))
    return Figure(name, title, sentences=tuple(map(_equal_kl, asked)), spec=charts.finish(chart))


def _scale_figure(study: _Study, loss: str) -> Figure:
    """The best performance of every arm over the number of parameters, absolute and relative to online."""
    name, title = "figure_11", f"Figures 11 and 14: best performance over the size of the policy, {loss_name(loss)}"
    values = [row for size in study.evidence.sizes for row in _best_rows(study, size, loss)]
    if not values:
        return Figure(name, title, missing="no arm has win rates at several sizes")
    x = alt.X("parameters:Q", title="Parameters (logarithmic)", scale=alt.Scale(type="log", base=2, nice=False))
    colour, shape = _styles(values, study.arms)
    sides = []
    for field, words in (("best", "90 % quantile of the win rate"), ("relative", "The same, relative to online's")):
        base = alt.Chart(alt.Data(values=values)).transform_filter(f"isValid(datum.{field})").encode(x)
        y = alt.Y(f"{field}:Q", title=words, scale=alt.Scale(zero=False))
        marks = base.mark_point(filled=True, size=55).encode(
            y, colour, shape, tooltip=["arm:N", "seed:N", f"{field}:Q"]
        )
        line = base.mark_line(strokeWidth=1.5).encode(alt.Y(f"mean({field}):Q", title=words), colour)
        sides.append(alt.layer(line, marks).properties(width=375, height=300))
    said = ("A mark is a seed: the 90 % quantile over all checkpoints of all runs of the arm at that size.",)
    return Figure(name, title, study.claims("10", "11", "14"), said, charts.finish(alt.hconcat(*sides)))


def _best_rows(study: _Study, size: Evidence, loss: str) -> list[Row]:
    """A row for each arm and seed of a size: the 90 % quantile of the win rate, and its ratio to that of online."""
    best: dict[tuple[str, int], float] = {}
    for arm, seed in itertools.product(study.main, size.seeds):
        measured = [r for r in size.results if r.method == (arm, loss) and r.seed == seed and "win_rate" in r.outcomes]
        if measured:
            best[arm, seed] = float(np.quantile([result.mean("win_rate") for result in measured], 0.9))
    parameters = max(result.parameters for result in size.results)
    return [
        {"arm": arm, "seed": seed, "parameters": parameters, "best": value}
        | ({"relative": value / best["online", seed]} if best.get(("online", seed)) else {})
        for (arm, seed), value in best.items()
    ]


def _online_data_figure(study: _Study, loss: str) -> Figure:
    """Accuracy along training on D_online, on held-out pairs and on own samples; the proxy's as a line."""
    name, title = "figure_6", f"Figure 6: classification of other pairs along training, {loss_name(loss)}"
    names = ("stream_accuracy", "heldout_accuracy", "own_accuracy")
    metrics = [metric for metric in names if any(metric in row for row in study.rows)]
    rows = [row for row in study.select(loss, metrics) if row["arm"] != OPPONENT]
    x = alt.X("step:Q", title="Gradient steps", scale=alt.Scale(zero=False, nice=False, padding=12))
    panels = []
    for metric in metrics:
        proxy = [row for row in study.rows if row["arm"] == PROXY[0] and metric in row]
        line = alt.Chart(alt.Data(values=proxy)).mark_rule(strokeDash=[6, 3], color=charts.INK)
        layers = _scatter(study, rows, x, metric)
        if proxy:
            layers.append(line.encode(_axis(alt.Y, metric), tooltip=_tooltip(proxy)))
        panels.append(alt.layer(*layers).properties(width=235, height=260))
    chart = alt.hconcat(*panels, data=alt.Data(values=_with_starts(rows)))
    said = ("The dashed line is the proxy preference model.",)
    return Figure(name, title, study.claims("6"), said, charts.finish(chart))


def _budget_figure(study: _Study, loss: str) -> Figure:
    """The best win rate of online and of offline within each KL budget, and their gap."""
    name, title = f"equal_kl_{file_word(loss)}", f"The question: best win rate within a KL budget, {loss_name(loss)}"
    comparison = next((c for c in findings.asked(study.comparisons, study.arms) if c.first[1] == loss), None)
    if comparison is None:
        needed = ", of ".join((*findings.question(study.arms), "SFT"))
        return Figure(name, title, missing=f"it needs checkpoints of {needed}, with KL and win rate")
    first, second = findings.question(study.arms)
    said = (_equal_kl(comparison),)
    if len(comparison.budgets) < 2:
        missing = f"the checkpoints of {first} and of {second} share no range of KL"
        return Figure(name, title, sentences=said, missing=missing)
    frontiers = [
        *_band_rows(comparison, comparison.first_frontier, first),
        *_band_rows(comparison, comparison.second_frontier, second),
    ]
    scale = alt.Scale(type="sqrt", zero=False, nice=False, padding=8)
    axis = alt.Axis(format="~g", tickCount=6)
    x = alt.X("budget:Q", title="KL budget (nats, square-root scale)", scale=scale, axis=axis)
    left = _band_chart(frontiers, x, "Win rate (%)").encode(_styles(frontiers, study.arms)[0])
    minus = f"{first} minus {second}"
    gap = _band_chart(_band_rows(comparison, comparison.gap, minus), x, f"Gap, {minus} (percentage points)")
    right = alt.layer(_level(0.0), gap.encode(color=alt.value(charts.INK)))
    chart = alt.hconcat(*(side.properties(width=375, height=300) for side in (left, right)))
    return Figure(name, title, sentences=said, spec=charts.finish(chart))


def _band_rows(comparison: Comparison, band: Band, arm: str) -> list[Row]:
    """A row per budget, proportions in per cent."""
    columns = zip(comparison.budgets, 100 * band.value, 100 * band.low, 100 * band.high, strict=True)
    names = ("budget", "value", "low", "high")
    return [{"arm": arm} | dict(zip(names, (round(float(v), 4) for v in row), strict=True)) for row in columns]


def _band_chart(rows: Sequence[Row], x: alt.X, title: str) -> alt.LayerChart:
    """Estimates as a line over their intervals as a band."""
    base, scale = alt.Chart(alt.Data(values=list(rows))).encode(x), alt.Scale(zero=False)
    tips = [alt.Tooltip(f"{field}:Q", format=".2f") for field in ("budget", "value", "low", "high")]
    band = base.mark_area(opacity=0.2).encode(alt.Y("low:Q", title=title, scale=scale), alt.Y2("high:Q"))
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=16))
    return alt.LayerChart(layer=[band, line.encode(alt.Y("value:Q", title=title), tooltip=["arm:N", *tips])])


def _accuracy_figure(study: _Study, losses: Sequence[str]) -> Figure:
    """Win rate over classification accuracy, every checkpoint, a panel per loss."""
    name, title, metrics = "figure_7", "Figure 7: win rate over accuracy on D_golden", ("win_rate", "accuracy")
    drawn = [loss for loss in losses if not study.lacking(loss, metrics)]
    if not drawn:
        return Figure(name, title, missing="not measured together: win_rate, accuracy")
    selected = {loss: study.select(loss, metrics) for loss in drawn}
    everything = [row for rows in selected.values() for row in rows]
    x = _axis(alt.X, "accuracy", nice=False, padding=12)
    panels = [
        alt.layer(
            *_scatter(study, everything, x, "win_rate", lines=False),
            data=alt.Data(values=_with_starts(rows)),
        ).properties(width=375, height=320, title=loss_name(loss))
        for loss, rows in selected.items()
    ]
    return Figure(name, title, study.claims("7"), spec=charts.finish(alt.concat(*panels, columns=2)))


def _training_figure(study: _Study, loss: str) -> Figure:
    """Accuracy and the log-probabilities of winner and loser along training."""
    name, title = f"figure_8_{file_word(loss)}", f"Figure 8: classification along training, {loss_name(loss)}"
    metrics = ("accuracy", "chosen_log_ratio", "rejected_log_ratio")
    if reason := study.lacking(loss, metrics):
        return Figure(name, title, missing=reason)
    rows = [row for row in study.select(loss, metrics) if row["arm"] != OPPONENT]
    x = alt.X("step:Q", title="Gradient steps", scale=alt.Scale(zero=False, nice=False, padding=12))
    panels = [alt.layer(*_scatter(study, rows, x, metric)).properties(width=235, height=260) for metric in metrics]
    claims = study.claims("8") if loss == "ipo" else ()
    chart = alt.hconcat(*panels, data=alt.Data(values=_with_starts(rows)))
    return Figure(name, title, claims, spec=charts.finish(chart))
