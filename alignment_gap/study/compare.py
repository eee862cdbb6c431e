"""Compares folders side by side on one page: finished studies by their tables, or training jobs by their metrics."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt

from alignment_gap.errors import UserError
from alignment_gap.evaluation import charts
from alignment_gap.evaluation.intervals import Interval
from alignment_gap.folders import JOB, STUDY, AnyPath, locked, read_json
from alignment_gap.jobs.folder import DONE
from alignment_gap.study import analysis, findings
from alignment_gap.study.analysis import METRICS, OPPONENT, POLICIES_BESIDE_ARMS, CheckpointResult
from alignment_gap.study.arms import ARMS, MAIN, Arm, file_word
from alignment_gap.study.claims import CLAIMS
from alignment_gap.study.curves import TrainingRun, curves_figure, read_lines, throughput_table
from alignment_gap.study.marks import (
    OTHER_STYLES,
    WIDTH,
    Figure,
    Row,
    chart_row,
    estimates,
    kl_panels,
)
from alignment_gap.study.page import render, write_page
from alignment_gap.study.versions import versions
from alignment_gap.training.monitor import METRICS as LINES
from alignment_gap.training.monitor import is_of_the_clock

RESULTS, CLAIM_TABLE = "results.csv", "claims.csv"
_NONE = "\u2013"
_DIGEST = re.compile("[0-9a-f]{64}")
Table = list[dict[str, str]]
"""Rows of cells, by header."""


class StudyFolder(NamedTuple):
    """A finished study, read from its folder.

    Attributes:
      name: its name on the page.
      folder: its folder.
      settings: its settings with dotted keys; empty if the folder has none, as for a report over sizes.
      rows: rows of the charts, one per checkpoint.
      claims: the rows of claims.csv, by claim.
    """

    name: str
    folder: AnyPath
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    claims: Mapping[str, Mapping[str, str]]


class JobFolder(NamedTuple):
    """A training job, read from its folder.

    Attributes:
      name: its name on the page.
      folder: its folder.
      settings: its settings with dotted keys.
      run: its metrics.
    """

    name: str
    folder: AnyPath
    settings: Mapping[str, Any]
    run: TrainingRun


def write_comparison(folders: Sequence[AnyPath], workdir: AnyPath) -> AnyPath:
    """Writes report.html and figures/ on several studies, or on training jobs, to `workdir`.

    Returns:
      The path of the page.

    Raises:
      UserError: the folders are not all studies or all training jobs, or `workdir` holds a study or a job.
    """
    is_study = _is_of_studies(folders)
    if any((workdir / name).exists() for name in (STUDY, JOB, CLAIM_TABLE)):
        raise UserError(f"{workdir} holds a study or a job, and this would replace its report: give another --workdir")
    names = _names(folders)
    if is_study:
        page, figures = _studies_page([read_study(*each) for each in zip(names, folders, strict=True)])
    else:
        page, figures = _jobs_page([read_job(*each) for each in zip(names, folders, strict=True)])
    with locked(workdir):
        return write_page(workdir, page, figures, stale=("*.png",))


def _is_of_studies(folders: Sequence[AnyPath]) -> bool:
    """Whether the folders are studies; otherwise they are training jobs."""
    if doubled := [folder for at, folder in enumerate(folders) if folder in folders[:at]]:
        raise UserError(f"{doubled[0]} is given twice: give each folder once")
    studies = [folder for folder in folders if (folder / CLAIM_TABLE).exists() and (folder / RESULTS).exists()]
    jobs = [folder for folder in folders if (folder / JOB).exists() and (folder / LINES).exists()]
    for folder in folders:
        if folder not in studies and folder not in jobs:
            raise UserError(
                f"{folder} has neither {CLAIM_TABLE} of a finished study nor {LINES} of a training job: give a folder "
                "with one of them"
            )
    if studies and jobs:
        raise UserError(f"{studies[0]} is a study and {jobs[0]} is a training job: give folders of one kind")
    if len(studies) == 1:
        raise UserError(
            f"{studies[0]} is the only study: give a second one, or write its own report again with alignment-gap "
            "study --job=report and its --config"
        )
    return bool(studies)


def _names(folders: Sequence[AnyPath]) -> list[str]:
    """The last part of each path, without the hash that a study adds; the whole path if two last parts are equal."""
    last = [re.sub(r"-[0-9a-f]{12}$", "", folder.name) for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


# Reading.


def read_study(name: str, folder: AnyPath) -> StudyFolder:
    """Reads a study from the files of its report."""
    path = folder / STUDY
    settings = read_json(path, remedy="run the study again") if path.exists() else {}
    claims = {row["claim"]: row for row in _csv_rows(folder / CLAIM_TABLE)}
    return StudyFolder(name, folder, settings, [_chart_row(row) for row in _csv_rows(folder / RESULTS)], claims)


def _csv_rows(path: AnyPath) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def _chart_row(row: Mapping[str, str]) -> Row:
    """Converts a row of results.csv to a row of a chart."""

    def number(name: str) -> float:
        return float(row.get(name) or "nan")

    result = CheckpointResult(
        row["arm"],
        row["loss"],
        number("beta"),
        number("learning_rate"),
        int(row["seed"]),
        int(row["step"]),
        {},
        steps_factor=int(row.get("steps_factor") or 1),
    )
    means = {name: number(name) for name in analysis.COLUMNS[len(analysis.IDENTITY) :]}
    return chart_row(result, means) | ({"size": row["size"]} if row.get("size") else {})


def read_job(name: str, folder: AnyPath) -> JobFolder:
    """Reads a training job from its settings and metrics; it need not be finished."""
    settings = read_json(folder / JOB, remedy="run the job again")
    done = folder / DONE
    seconds = read_json(done, remedy="run the job again")["seconds"] if done.exists() else math.nan
    loss = str(settings.get("loss.name", "")) if settings.get("kind") == "policy" else ""
    return JobFolder(name, folder, settings, TrainingRun(name, read_lines(folder), seconds, loss))


# Studies.


def _studies_page(studies: Sequence[StudyFolder]) -> tuple[str, list[Figure]]:
    rows = [row for study in studies for row in study.rows if "size" not in row]
    arms = {arm.name for arm in _arms(rows)}
    losses = dict.fromkeys(row["loss"] for row in rows if row["arm"] in arms)
    figures = [_claims_figure(studies)] + [
        main_figure(studies, loss, metric)
        for loss in losses
        for metric in ("win_rate", "rubric")
        if any(_of_loss(study.rows, loss, metric) for study in studies)
    ]
    page = render(
        "studies.html.jinja",
        figures,
        names=[study.name for study in studies],
        folders=[str(study.folder) for study in studies],
        claims=claims_table(studies),
        peaks=[row for study in studies for row in _peaks(study)],
        settings=_differing({study.name: study.settings for study in studies}),
        versions=[{"Package": name, "Version": version} for name, version in versions().items()],
    )
    return page, figures


def claims_table(studies: Sequence[StudyFolder]) -> list[dict[str, Any]]:
    """A row for every claim that a study measured: the paper's statement, and the answer of each study."""
    names = dict.fromkeys(name for study in studies for name, row in study.claims.items() if row["seeds"] != "0")
    rows = []
    for name in names:
        first = next(study.claims[name] for study in studies if name in study.claims)
        cells = [_claim_cell(study.claims.get(name)) for study in studies]
        rows.append({"claim": name, "paper": first["paper"], "figure": first["figure"], "cells": cells})
    return rows


def _claim_cell(row: Mapping[str, str] | None) -> dict[str, str] | None:
    """A study's answer to a claim: the verdict, the number, its interval, and the distance that it could see."""
    if row is None:
        return None
    value, interval, could_see = _NONE, "", _NONE
    if row["value"]:
        numbers = Interval(*(float(row[name]) for name in ("value", "low", "high")))
        estimate = next((claim.estimate for claim in CLAIMS if claim.name == row["claim"]), None)
        if estimate is None:
            value, interval = f"{numbers.value:g}", f"{numbers.low:g} to {numbers.high:g}"
            could_see = f"{float(row['detectable']):g}"
        else:
            value, interval = findings.estimated(estimate, numbers)
            could_see = findings.distance(estimate, float(row["detectable"]))
    return {
        "verdict": row["verdict"],
        "value": value,
        "interval": interval,
        "seeds": row["seeds"],
        "could_see": could_see,
    }


def _claims_figure(studies: Sequence[StudyFolder]) -> Figure:
    """The gaps in win rate that claims are about, with a mark for each study."""
    base = Figure("claims", "Gaps in win rate, by claim", "Do the studies agree on the sign and the size of the gaps?")
    gaps = [
        claim.name
        for claim in CLAIMS
        if claim.estimate.is_gap and METRICS.get(claim.estimate.metric) is METRICS["win_rate"]
    ]
    values = [
        {"claim": name.replace("-", " "), "study": study.name}
        | {end: 100 * float(study.claims[name][end]) for end in ("value", "low", "high")}
        for name in gaps
        for study in studies
        if study.claims.get(name, {}).get("value")
    ]
    if not values:
        return dataclasses.replace(base, missing="no study measured one")
    names = [study.name for study in studies]
    colour = alt.Color(
        "study:N",
        scale=alt.Scale(domain=names, range=colours(len(names))),
        legend=alt.Legend(title=None),
    )
    y = alt.Y("claim:N", title=None, sort=None, axis=alt.Axis(labelLimit=300))
    chart = alt.Chart(alt.Data(values=values)).encode(y, colour, alt.YOffset("study:N", sort=names))
    drawn = estimates(chart, "Percentage points", ("study", "claim")).properties(width=WIDTH)
    return dataclasses.replace(base, spec=charts.finish(drawn))


def main_figure(studies: Sequence[StudyFolder], loss: str, metric: str) -> Figure:
    """A metric over KL under one loss, with a panel for each study, all on the same axes."""
    words = METRICS[metric].words
    base = Figure(
        f"figure_4_{file_word(loss).lower()}_{metric}",
        f"{words[0].upper()}{words[1:]} over KL to SFT, {loss}",
        f"Which arms are ahead in {words} under {loss}, and does every study see it?",
    )
    of_study = {study.name: _of_loss(study.rows, loss, metric) for study in studies}
    drawn = {name: rows for name, rows in of_study.items() if rows}
    if not drawn:
        return dataclasses.replace(base, missing=f"no arm has {words} under {loss}")
    arms = _arms([row for rows in drawn.values() for row in rows])
    said = tuple(f"{name} has no checkpoint under {loss} with {words}." for name, rows in of_study.items() if not rows)
    return dataclasses.replace(base, sentences=said, spec=charts.finish(kl_panels(drawn, arms, metric)))


def _of_loss(rows: Sequence[Row], loss: str, metric: str) -> list[Row]:
    """The rows of the main arms under a loss, with SFT and the golden policy; empty if no arm has the metric."""
    main = {arm.name for arm in _arms(rows)}
    measured = [row for row in rows if metric in row and "kl" in row]
    trained = [row for row in measured if row["loss"] == loss and row["arm"] in main]
    return trained and [*(row for row in measured if row["arm"] in POLICIES_BESIDE_ARMS), *trained]


def _arms(rows: Sequence[Row]) -> list[Arm]:
    """The arms of the main figures, and arms that are not in the table, in further colours."""
    own = dict.fromkeys(row["arm"] for row in rows if row["arm"] not in {arm.name for arm in ARMS} | {*OTHER_STYLES})
    free = [colour for colour in charts.COLOURS if colour not in {arm.colour for arm in ARMS if arm.panel == MAIN}]
    further = [
        dataclasses.replace(ARMS[0], name=name, colour=free[i % len(free)], shape="triangle-down")
        for i, name in enumerate(name for name in own if name != OPPONENT)
    ]
    return [*(arm for arm in ARMS if arm.panel == MAIN), *further]


def _peaks(study: StudyFolder) -> Table:
    """The best checkpoint of every method of a study, over its seeds."""
    best: dict[tuple[str, str], Row] = {}
    for row in study.rows:
        method = row["loss"], row["arm"]
        if "win_rate" in row and "size" not in row and row["win_rate"] > best.get(method, {}).get("win_rate", -1):
            best[method] = row
    return [
        {"Study": study.name, "Loss": loss, "Arm": arm, "Setting": row["setting"], "Seed": str(row["seed"])}
        | {"Step": str(row["step"]), "KL": row.get("kl_text", _NONE), "Win rate (95 %)": row["win_rate_text"]}
        for (loss, arm), row in best.items()
    ]


# Training jobs.


def _jobs_page(jobs: Sequence[JobFolder]) -> tuple[str, list[Figure]]:
    names = [job.name for job in jobs]
    base = Figure("training", "Training curves", "Which run learns faster, and does each of them train steadily?")
    figures = [curves_figure(base, [job.run for job in jobs], dict(zip(names, colours(len(names)), strict=True)))]
    page = render(
        "jobs.html.jinja",
        figures,
        names=names,
        folders=[str(job.folder) for job in jobs],
        last=_last_metrics(jobs),
        throughput=throughput_table([job.run for job in jobs]),
        settings=_differing({job.name: job.settings for job in jobs}),
        versions=[{"Package": name, "Version": version} for name, version in versions().items()],
    )
    return page, figures


def _last_metrics(jobs: Sequence[JobFolder]) -> Table:
    """The last line of every job, with a row for each metric that is not a time."""
    last = {job.name: job.run.lines[-1] for job in jobs if job.run.lines}
    metrics = dict.fromkeys(metric for line in last.values() for metric in line if not is_of_the_clock(metric))
    return [
        {"Metric": metric.replace("_", " ")}
        | {name: f"{line[metric]:.4g}" if metric in line else _NONE for name, line in last.items()}
        for metric in metrics
    ]


# Both.


def colours(count: int) -> list[str]:
    """`count` colours; they repeat after the end of the list."""
    return [charts.COLOURS[i % len(charts.COLOURS)] for i in range(count)]


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    """The settings that differ between folders, with a column for each folder."""
    keys = dict.fromkeys(key for each in settings.values() for key in each)
    rows = [{"Setting": key} | {name: _shown(each, key) for name, each in settings.items()} for key in keys]
    return [row for row in rows if len({*list(row.values())[1:]}) > 1]


def _shown(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, _NONE)
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    return f"{value:g}" if isinstance(value, float) else str(value)
