"""Diagrams of a study, drawn from its graph of jobs: who learns from whom, and which jobs use the online stream."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from alignment_gap.evaluation import charts
from alignment_gap.jobs.config import POLICY
from alignment_gap.jobs.folder import Job
from alignment_gap.jobs.train import TRAIN
from alignment_gap.study.arms import file_word
from alignment_gap.study.graph import StudyGraph
from alignment_gap.study.marks import WIDTH, Figure

# Patterns of job names, and the labels of the boxes. LOSS stands for the first loss of the study.
_WORKFLOW = {
    "data": "human pairs",
    "sft": "SFT",
    "base": "SFT of the base",
    "golden": "golden model",
    "relabelled-train": "D_golden",
    "proxy": "proxy model",
    "golden-ipo-.*": "golden policy",
    "online-LOSS-.*": "online",
    "offline-LOSS-.*": "offline",
}
_STREAM = {
    "online-LOSS-.*": "online",
    "pairs-.*-LOSS": "{pairs}",
    "(shuffled|replayed|small_windows|large_windows)-LOSS-.*": "{arm}",
    "(final_vs_final|sft_vs_early|early_vs_final)-LOSS-.*": "{arm}",
}

# Kinds of results; each has its own outline.
_PAIRS, _JUDGE, _POLICY = "pairs", "preference model", "policy"
_COLOURS = {_PAIRS: charts.LINE, _JUDGE: "#CC79A7", _POLICY: "#0072B2"}

# Half the width of a box in columns, half its height in rows, and how far the columns are bent in rows.
_WIDE, _HIGH, _BEND = 0.36, 0.16, 0.12


def diagram_figures(graph: StudyGraph, loss: str) -> list[Figure]:
    """The workflow (figure 2 of the paper) and the uses of the online stream (figure 3), for one seed and one loss."""
    prefix = f"seed{graph.seeds[0].seed}-"
    jobs = {job.name.removeprefix(prefix): job for job in graph.jobs if job.name.startswith(prefix)}
    made = collections.Counter(map(_made, jobs.values()))
    workflow = Figure(
        "figure_2",
        "Figure 2: the workflow",
        "Who learns from whom, and who judges?",
        "A golden preference model stands for people: it labels the pairs and judges. Offline policies learn from its "
        "labels; online policies learn from a proxy that was trained on these labels.",
        sentences=(
            f"A seed of this study has {len(jobs)} jobs, which train {made[_POLICY]} policies and {made[_JUDGE]} "
            "preference models.",
        ),
    )
    stream = Figure(
        "figure_3",
        "Figure 3: what is made of the online run",
        "Is online ahead for what its pairs hold, or for when they are drawn?",
        "The pairs of an online run are kept. Offline runs train on them in their order and in random order, and on "
        "new pairs of the policies that the run went through.",
    )
    streams = _under(_STREAM, loss)
    drawn = [_drawn(workflow, jobs, _under(_WORKFLOW, loss)), _drawn(stream, jobs, streams)]
    readers = [word for word in _boxes(jobs, streams) if word != "online" and not word.startswith("pairs ")]
    said = f"Arms of this study that learn from it: {', '.join(readers) or 'none'}."
    return [drawn[0], dataclasses.replace(drawn[1], sentences=(said,))]


def _under(patterns: Mapping[str, str], loss: str) -> dict[str, str]:
    return {pattern.replace("LOSS", re.escape(file_word(loss))): word for pattern, word in patterns.items()}


def _made(job: Job) -> str:
    """The kind of a job's result."""
    if job.kind is not TRAIN:
        return _PAIRS
    return _POLICY if job.config.kind == POLICY else _JUDGE


def _boxes(jobs: Mapping[str, Job], patterns: Mapping[str, str]) -> dict[str, str]:
    """The kind of result of each box, by label."""
    return {word: _made(job) for name, job in jobs.items() if (word := _word(name, patterns))}


def _drawn(figure: Figure, jobs: Mapping[str, Job], patterns: Mapping[str, str]) -> Figure:
    words = {job.name: word for name, job in jobs.items() if (word := _word(name, patterns))}
    if not words:
        return dataclasses.replace(figure, missing="this study has none of its jobs")
    spec = _drawing(_edges(list(jobs.values()), words), _boxes(jobs, patterns))
    return dataclasses.replace(figure, spec=spec)


def _word(name: str, patterns: Mapping[str, str]) -> str:
    """The label of a job's box; empty if the job is not drawn."""
    found = next((word for pattern, word in patterns.items() if re.fullmatch(pattern, name)), "")
    arm = name.partition("-")[0]
    pairs = "pairs " + name.removeprefix("pairs-").rpartition("-")[0].replace("_", " ")
    return found.format(arm=arm.replace("_", " "), pairs=pairs)


def _edges(jobs: Sequence[Job], words: Mapping[str, str]) -> list[tuple[str, str]]:
    """Edges from a job to each job that reads it, by label; jobs with one label share a box."""
    edges = [
        (words[need.name], words[job.name])
        for job in jobs
        for need in job.needs
        if job.name in words and need.name in words
    ]
    return list(dict.fromkeys(edges))


def _places(edges: Sequence[tuple[str, str]], words: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Every node's column, after the columns of all nodes that it reads; and its position in the column, around 0."""
    columns: dict[str, int] = {}
    for word in words:  # In the order of the graph, so the inputs of a node already have columns.
        columns[word] = max((columns[start] + 1 for start, end in edges if end == word and start in columns), default=0)
    places: dict[str, tuple[int, float]] = {}
    for column in set(columns.values()):
        members = [word for word in words if columns[word] == column]
        # On a parabola, no three columns are in line, so few lines cross a box between their ends.
        bent = _BEND * (column - max(columns.values()) / 2) ** 2
        places |= {word: (column, (len(members) - 1) / 2 - row - bent) for row, word in enumerate(members)}
    return places


def _drawing(edges: Sequence[tuple[str, str]], boxes: Mapping[str, str]) -> dict[str, object]:
    """Boxes with labels, and lines from an input to its readers, from left to right."""
    places = _places(edges, list(boxes))
    nodes = [
        {"job": word, "makes": boxes[word], "x": x, "y": y}
        | {"left": x - _WIDE, "right": x + _WIDE, "low": y - _HIGH, "high": y + _HIGH}
        for word, (x, y) in places.items()
    ]
    ends = ("x", "y", "x2", "y2")
    lines = [
        {"edge": f"{start} to {end}"} | dict(zip(ends, (*places[start], *places[end]), strict=True))
        for start, end in edges
    ]
    scale = alt.Scale(nice=False, zero=False)

    def at(channel: Any, name: str) -> Any:
        return channel(f"{name}:Q", axis=None, scale=scale)

    shown = [makes for makes in _COLOURS if makes in boxes.values()]
    colours = alt.Scale(domain=shown, range=[_COLOURS[makes] for makes in shown])
    stroke = alt.Stroke("makes:N", scale=colours, legend=alt.Legend(title=None))
    line = alt.Chart(alt.Data(values=lines)).mark_rule(color=charts.LINE)
    box = alt.Chart(alt.Data(values=nodes))
    chart = alt.layer(
        line.encode(at(alt.X, "x"), at(alt.Y, "y"), x2="x2:Q", y2="y2:Q", tooltip="edge:N"),
        box.mark_rect(fill=charts.GRID, strokeWidth=1.5, cornerRadius=4).encode(
            at(alt.X, "left"), at(alt.Y, "low"), stroke, x2="right:Q", y2="high:Q", tooltip=["job:N", "makes:N"]
        ),
        box.mark_text(fontSize=12, color=charts.INK).encode(at(alt.X, "x"), at(alt.Y, "y"), alt.Text("job:N")),
    )
    columns = 1 + max((column for column, _ in places.values()), default=0)
    rows = max((abs(row) for _, row in places.values()), default=0)
    return charts.finish(chart.properties(width=min(WIDTH, 130 * columns), height=int(90 + 90 * rows)))
