"""A study with data and folder in a bucket has the same results as on a disk, byte for byte."""

import dataclasses

import pytest
from studies import newly_run, run

from alignment_gap.launch import Task, status_text
from alignment_gap.storage import Url


@pytest.mark.slow
def test_a_study_from_and_to_a_bucket(config, finished, s3_folder, undrawn):
    data = finished.graph.job("seed0-data").folder
    for path in data.rglob("*"):
        if path.is_file():
            (s3_folder / "data" / path.relative_to(data)).write_bytes(path.read_bytes())
    moved = dataclasses.replace(config, prepared=str(s3_folder / "data"))
    study, _ = run(moved, s3_folder / "study")
    assert isinstance(study.workdir, Url) and all(isinstance(job.folder, Url) for job in study.graph.jobs)
    ours, theirs = ((each.workdir / "results.csv").read_bytes() for each in (study, finished))
    assert ours == theirs and ours.count(b"\n") > 5
    assert (study.workdir / "report.html").is_file() and list((study.workdir / "figures").glob("figure_*.png"))
    again, lines = run(moved, s3_folder / "study")
    assert newly_run(lines)(again.graph) == []
    tasks = [Task(job.name, job.words, job.folder) for job in study.graph.jobs]
    assert {line.split()[-1] for line in status_text(tasks).splitlines()} == {"done"}
