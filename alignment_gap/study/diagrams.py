"""Diagrams of a study, drawn from its graph of jobs: who learns from whom, and what is made of the online stream."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from alignment_gap.evaluation import charts
from alignment_gap.jobs.folder import Job
from alignment_gap.study.figures import Figure
from alignment_gap.study.graph import StudyGraph

# Jobs by the pattern of their names, and what a reader calls them.
_WORKFLOW = {
    "data": "human pairs",
    "sft": "SFT",
    "base": "SFT of the base",
    "golden": "golden model",
    "relabelled-train": "D_golden",
    "proxy": "proxy model",
    "golden-ipo-.*": "golden policy",
    "online-ipo-.*": "online",
    "offline-ipo-.*": "offline",
}
_STREAM = {
    "online-ipo-.*": "online",
    "pairs-.*-ipo": "{pairs}",
    "(shuffled|replayed|small_windows|large_windows)-ipo-.*": "{arm}",
    "(final_vs_final|sft_vs_early|early_vs_final)-ipo-.*": "{arm}",
}

# Half the width and height of a box, and how far the columns are bent, in columns and rows.
_WIDE, _HIGH, _BEND = 0.36, 0.16, 0.12


def diagram_figures(graph: StudyGraph) -> list[Figure]:
    """The workflow (figure 2 of the paper), and what reads the stream of the online run (figure 3), of one seed."""
    prefix = f"seed{graph.seeds[0].seed}-"
    jobs = [job for job in graph.jobs if job.name.startswith(prefix)]
    titles = {
        "figure_2": ("Figure 2: who learns from whom", _WORKFLOW),
        "figure_3": ("Figure 3: what is made of the online run", _STREAM),
    }
    figures = []
    for name, (title, patterns) in titles.items():
        words = {job.name: word for job in jobs if (word := _word(job.name.removeprefix(prefix), patterns))}
        figures.append(Figure(name, title, spec=_drawing(_edges(jobs, words), list(dict.fromkeys(words.values())))))
    return figures


def _word(name: str, patterns: Mapping[str, str]) -> str:
    """What a reader calls a job; empty for one that is not drawn."""
    found = next((word for pattern, word in patterns.items() if re.fullmatch(pattern, name)), "")
    arm = name.partition("-")[0]
    pairs = "pairs " + name.removeprefix("pairs-").rpartition("-")[0].replace("_", " ")
    return found.format(arm=arm.replace("_", " "), pairs=pairs)


def _edges(jobs: Sequence[Job], words: Mapping[str, str]) -> list[tuple[str, str]]:
    """From a job to each that reads it, both by their words; jobs of one word are one."""
    edges = [
        (words[need.name], words[job.name])
        for job in jobs
        for need in job.needs
        if job.name in words and need.name in words
    ]
    return list(dict.fromkeys(edges))


def _places(edges: Sequence[tuple[str, str]], words: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Every node's column, one after the last of those that it reads, and its place in the column, about 0."""
    columns: dict[str, int] = {}
    for word in words:  # In the order of the graph: what a node reads has its column already.
        columns[word] = max((columns[start] + 1 for start, end in edges if end == word and start in columns), default=0)
    places: dict[str, tuple[int, float]] = {}
    for column in set(columns.values()):
        members = [word for word in words if columns[word] == column]
        # On a parabola no three columns are in line, so that few lines go through a box between their ends.
        bent = _BEND * (column - max(columns.values()) / 2) ** 2
        places |= {word: (column, (len(members) - 1) / 2 - row - bent) for row, word in enumerate(members)}
    return places


def _drawing(edges: Sequence[tuple[str, str]], words: Sequence[str]) -> dict[str, object]:
    """Boxes of words, and lines from what is read to who reads it, from left to right."""
    places = _places(edges, words)
    nodes = [
        {"job": word, "x": x, "y": y, "left": x - _WIDE, "right": x + _WIDE, "low": y - _HIGH, "high": y + _HIGH}
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

    line = alt.Chart(alt.Data(values=lines)).mark_rule(color=charts.LINE)
    box = alt.Chart(alt.Data(values=nodes))
    chart = alt.layer(
        line.encode(at(alt.X, "x"), at(alt.Y, "y"), x2="x2:Q", y2="y2:Q", tooltip="edge:N"),
        box.mark_rect(color=charts.GRID).encode(at(alt.X, "left"), at(alt.Y, "low"), x2="right:Q", y2="high:Q"),
        box.mark_text(fontSize=12, color=charts.INK).encode(at(alt.X, "x"), at(alt.Y, "y"), alt.Text("job:N")),
    )
    rows = max((abs(row) for _, row in places.values()), default=0)
    return charts.finish(chart.properties(width=760, height=int(90 + 90 * rows)))
