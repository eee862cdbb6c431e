"""Training curves: the metrics of training jobs as figures, and a table of their throughput."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from alignment_gap.evaluation import charts
from alignment_gap.folders import AnyPath
from alignment_gap.study.analysis import ORIGIN, CheckpointResult, loss_name
from alignment_gap.study.arms import GOLDEN, MAIN, Arm, file_word
from alignment_gap.study.marks import OTHER_STYLES, Figure, Row, setting_fields, strokes
from alignment_gap.training.monitor import METRICS, MFU

# The metrics that are drawn, in the order of the panels: the title of the axis, and whether it is logarithmic.
CURVES = {
    "loss": ("Loss", False),
    "accuracy": ("Accuracy on the batch", False),
    "margin": ("Margin (nats)", False),
    "kl": ("KL to the reference (nats)", False),
    "gradient_norm": ("Gradient norm (logarithmic)", True),
    "learning_rate": ("Learning rate", False),
}
# The preference models, by the names of their jobs; the golden policy is also called golden.
JUDGES = {"golden": "golden model", "proxy": "proxy model"}
_STAGES = {ORIGIN: "supervised fine-tuning", "judges": "the preference models"}
_COLOURS = {
    ORIGIN: OTHER_STYLES[ORIGIN][0],
    "base": charts.COLOURS[0],
    JUDGES["golden"]: GOLDEN.colour,
    JUDGES["proxy"]: charts.COLOURS[3],
}
_FURTHER_JUDGES = tuple(colour for colour in charts.COLOURS if colour not in _COLOURS.values())
_QUESTIONS = {
    ORIGIN: "Has the policy that all arms start from stopped improving?",
    "judges": "Did the preference models learn, and were they stopped in time?",
}
_PAPER = {
    ORIGIN: "It shows no curve; it trains for 4,000 steps at 3e-5, three to four epochs of the pooled tasks.",
    "judges": "It stops both about where validation accuracy flattens; the proxy reaches 70 to 90 % on its own data.",
    "ipo": "It shows no curve; 4,000 steps at 1e-5, and offline at 3e-6 to 3e-5 for up to 20,000 steps.",
}
# Limits for the points of a curve and the rows of a figure, so that a page with a thousand runs still opens.
_MOST_POINTS, _FEWEST_POINTS, _MOST_ROWS = 50, 8, 1500


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A training job and its metrics.

    Attributes:
      name: name of its curves: an arm, "sft", one of `JUDGES`, or a folder.
      lines: metrics of steps, ascending.
      seconds: duration of the job; nan if it is not finished.
      loss: name of the loss; empty for a preference model.
      beta: regularisation; nan for a loss without one.
      learning_rate: the largest learning rate.
      steps_factor: its number of steps, as a multiple of the online steps.
      seed: seed of the study.
    """

    name: str
    lines: Sequence[Mapping[str, float]]
    seconds: float = math.nan
    loss: str = ""
    beta: float = math.nan
    learning_rate: float = math.nan
    steps_factor: int = 1
    seed: int = 0

    @property
    def setting(self) -> str:
        """Its setting in the same words as `CheckpointResult.setting`."""
        return CheckpointResult("", "", self.beta, self.learning_rate, 0, 0, {}, steps_factor=self.steps_factor).setting


def read_lines(folder: AnyPath) -> list[dict[str, float]]:
    """The lines of metrics in the folder of a run; a line that is still being written is left out.

    Values that were not finite are null in the file, and nan here.
    """
    path, lines = folder / METRICS, []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            break
        lines.append({name: math.nan if value is None else value for name, value in values.items()})
    return lines


# Figures.


def stage_figures(
    runs: Sequence[TrainingRun], results: Sequence[CheckpointResult], arms: Sequence[Arm]
) -> list[Figure]:
    """The curves of every stage of a study: SFT, the preference models, and the arms by their loss or panel."""
    panels = {arm.name: arm.panel for arm in arms}
    stages: dict[str, list[TrainingRun]] = {}
    for run in runs:
        panel = panels.get(run.name, MAIN)
        arms_stage = run.loss if panel == MAIN else panel
        stages.setdefault(_own_stage(run) or arms_stage, []).append(run)
    colours = _COLOURS | {arm.name: arm.colour for arm in (*arms, GOLDEN)}
    judges = dict.fromkeys(run.name for run in runs if not run.loss and run.name not in colours)
    colours |= dict(zip(judges, itertools.cycle(_FURTHER_JUDGES), strict=False))
    kl: dict[tuple[object, ...], list[Mapping[str, float]]] = {}
    for result in results:
        if result.step and "kl" in result.outcomes and not result.size:
            key = result.arm, result.loss, result.setting, result.seed
            kl.setdefault(key, []).append({"step": result.step, "kl": result.mean("kl")})
    figures = []
    for stage, of_stage in stages.items():
        words = _STAGES.get(stage, f"the arms of {stage}" if stage in panels.values() else loss_name(stage))
        base = Figure(
            f"training_{re.sub(r'[^a-z0-9_.]+', '_', file_word(stage).lower())}",
            f"Training: {words}",
            _QUESTIONS.get(stage, f"Is training steady, and what does it cost in KL, for {words}?"),
            _PAPER.get(stage, f"It shows no curve of {words}."),
        )
        measured = [kl.get((run.name, run.loss, run.setting, run.seed), []) for run in of_stage]
        figures.append(curves_figure(base, of_stage, colours, measured))
    return figures


def curves_figure(
    base: Figure,
    runs: Sequence[TrainingRun],
    colours: Mapping[str, str],
    further: Sequence[Sequence[Mapping[str, float]]] = (),
) -> Figure:
    """Draws a panel for each of `CURVES` that a run has, over steps, with a colour for each name.

    Args:
      base: the figure without a drawing.
      runs: the runs to draw.
      colours: colours by the names of the runs.
      further: for each run, metrics by step that were measured afterwards.
    """
    points = min(_MOST_POINTS, max(_FEWEST_POINTS, _MOST_ROWS // max(len(runs), 1)))
    rows = [row for run in runs for row in _rows(run, run.lines, points)]
    rows += [row for run, lines in zip(runs, further, strict=False) for row in _rows(run, lines, points)]
    drawn = [metric for metric in CURVES if any(metric in row for row in rows)]
    if not drawn:
        return dataclasses.replace(base, missing="the runs have no line of metrics")
    names = [name for name in colours if any(row["series"] == name for row in rows)]
    scale = alt.Scale(domain=names, range=[colours[name] for name in names])
    colour = alt.Color("series:N", scale=scale, legend=alt.Legend(title=None, symbolType="stroke"))
    panels = [_panel(metric, rows, colour) for metric in drawn]
    spec = charts.finish(alt.concat(*panels, columns=3, data=alt.Data(values=rows)))
    return dataclasses.replace(base, sentences=(_ends(runs, base.title),), spec=spec)


def _own_stage(run: TrainingRun) -> str:
    """The stage of a run of SFT or of a preference model; empty for an arm."""
    if run.name in (ORIGIN, "base"):
        return ORIGIN
    return "" if run.loss else "judges"


def _rows(run: TrainingRun, lines: Sequence[Mapping[str, float]], points: int) -> list[Row]:
    """A row for each point of a run's curves: the means over several lines, at the step of the last of them."""
    identity = {"series": run.name, "seed": run.seed, "setting": run.setting}
    identity |= {"run": f"{run.name} {run.loss} {run.setting} seed {run.seed}"}
    identity |= setting_fields(run.beta, run.learning_rate, run.steps_factor)
    rows = []
    for start, end in zip(*_parts(len(lines), points), strict=True):
        part = lines[start:end]
        row = identity | {"step": int(part[-1]["step"])}
        for metric, (_, is_logarithmic) in CURVES.items():
            values = [line[metric] for line in part if math.isfinite(line.get(metric, math.nan))]
            if values and (min(values) > 0 or not is_logarithmic):
                row[metric] = float(f"{np.mean(values):.4g}")
        rows.append(row)
    return rows


def _parts(length: int, points: int) -> tuple[list[int], list[int]]:
    """Starts and ends of about equal parts of `length` lines."""
    ends = np.linspace(0, length, min(length, points) + 1).round().astype(int).tolist()
    return ends[:-1], ends[1:]


def _panel(metric: str, rows: Sequence[Row], colour: alt.Color) -> alt.LayerChart | alt.FacetChart:
    title, is_logarithmic = CURVES[metric]
    scale = alt.Scale(type="log") if is_logarithmic else alt.Scale(zero=False)
    ticks = alt.Axis(format=".0%") if metric == "accuracy" else alt.Axis(tickCount=6, format="~g")
    chart = alt.Chart().transform_filter(f"isValid(datum.{metric})")
    chart = chart.encode(
        alt.X("step:Q", title="Gradient steps"), alt.Y(f"{metric}:Q", title=title, scale=scale, axis=ticks), colour
    )
    tips: list[Any] = [*(f"{name}:N" for name in ("series", "setting", "seed", "step")), f"{metric}:Q"]
    line = chart.mark_line(strokeWidth=1.3).encode(alt.Detail("run:N"), **strokes(rows))
    # A line of one row cannot be seen.
    alone = chart.transform_joinaggregate(rows="count()", groupby=["run"]).transform_filter("datum.rows == 1")
    hover = chart.mark_point(size=90, opacity=0).encode(tooltip=tips)
    return alt.layer(line, alone.mark_point(filled=True, opacity=1), hover).properties(width=325, height=210)


def _ends(runs: Sequence[TrainingRun], title: str) -> str:
    """The loss at the first and the last line of each name, if there are two, and the number of skipped updates."""
    found = []
    for name in dict.fromkeys(run.name for run in runs):
        of_name = [run.lines for run in runs if run.name == name and run.lines]
        first, last = (np.mean([lines[at].get("loss", math.nan) for lines in of_name]) for at in (0, -1))
        has_two = any(len(lines) > 1 for lines in of_name)
        found.append(f"{first:.3g} to {last:.3g} ({name})" if has_two else f"{last:.3g} ({name}, one line)")
    skipped = sum(int(run.lines[-1].get("skipped", 0)) for run in runs if run.lines)
    return f"{title}, loss of the first and of the last line: {', '.join(found)}; updates skipped: {skipped}."


# Throughput.


def throughput_table(runs: Sequence[TrainingRun]) -> list[dict[str, str]]:
    """A row of speeds for each name and loss: the median over the lines of a job, averaged over jobs."""
    groups: dict[tuple[str, str], list[TrainingRun]] = {}
    for run in runs:
        groups.setdefault((run.name, loss_name(run.loss) if run.loss else "preference"), []).append(run)
    return [_throughput(*key, group) for key, group in groups.items() if any(run.lines for run in group)]


def _throughput(name: str, loss: str, runs: Sequence[TrainingRun]) -> dict[str, str]:
    def median(metric: str) -> float:
        each = [[line[metric] for line in run.lines if metric in line] for run in runs]
        medians = [float(np.median(values)) for values in each if values]
        return float(np.mean(medians)) if medians else math.nan

    parts = ("update", "sampling", "judging", "reference", "data")
    step = sum(value for part in parts if not math.isnan(value := median(f"seconds_{part}")))
    steps = {int(run.lines[-1]["step"]) for run in runs if run.lines}
    row = {"Run": name, "Loss": loss, "Jobs": str(len(runs))}
    row["Steps"] = f"{min(steps):,}" if len(steps) == 1 else f"{min(steps):,} to {max(steps):,}"
    row |= {
        "Pairs/s": _shown(median("pairs_per_second"), ",.0f"),
        "Tokens/s": _shown(median("tokens_per_second"), ",.0f"),
    }
    shares = {part: median(f"seconds_{part}") / step if step else math.nan for part in parts}
    row |= {part.capitalize(): _shown(share, ".0%") for part, share in shares.items()}
    row["MFU"] = _shown(median(MFU), ".1%")
    row["Seconds a job"] = _shown(float(np.mean([run.seconds for run in runs])), ",.0f")
    return row


def _shown(value: float, form: str) -> str:
    return "\u2013" if math.isnan(value) else format(value, form)
