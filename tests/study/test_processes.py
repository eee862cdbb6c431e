"""A study in two processes equals the study in one; if one process refuses a setting, both do."""

import csv
import dataclasses
import pathlib
import re
import shutil

import numpy as np
import pytest
from job_runs import metrics
from process_runs import run_processes, said_by
from studies import rows

from alignment_gap.data.records import open_dataset
from alignment_gap.study.run import open_studies

NANO = ["study", f"--config={pathlib.Path(__file__).with_name('nano.py')}", "--workdir=study"]
# The golden policy is trained online, like the arms.
NO_ARMS = "--config.arms.names=()"


@pytest.mark.slow
def test_two_processes_make_the_study_that_one_makes(finished, config, tmp_path):
    """Sums over devices have another order, and Adam's division can enlarge the difference; no sampled token changes.

    Jobs that resemble others are copied from a study in one process: the proxy, which is a second judge, and
    evaluations of SFT.
    """
    arms = dataclasses.replace(config.arms, names=())
    (study,) = open_studies(dataclasses.replace(config, arms=arms), tmp_path / "study")
    copied = [
        job for job in study.graph.jobs if re.search(r"judge|proxy|validation|opponent-sft|evaluation-sft", job.name)
    ]
    for job in copied:
        shutil.copytree(finished.graph.job(job.name).folder, job.folder)
    commands = [[*NANO, NO_ARMS], [*NANO, NO_ARMS, "--list"]]
    statuses, ((said, errors), (second, _)) = run_processes(tmp_path, commands, commands)
    assert statuses == [0, 0], errors
    assert "report: study/report.html" in said
    assert (said.count(": finished before"), said.count(": done")) == (len(copied), 14) == (7, 14)
    assert not said_by(second)

    for job in study.graph.jobs:
        assert job.is_done
        theirs = finished.graph.job(job.name).folder
        if (job.folder / "metrics.jsonl").exists():
            for line, expected in zip(metrics(job.folder), metrics(theirs), strict=True):
                np.testing.assert_allclose(line["loss"], expected["loss"], rtol=1e-3, err_msg=job.name)
        for record in (path.parent.relative_to(job.folder) for path in job.folder.rglob("card.json")):
            ours, expected = (open_dataset(folder / record) for folder in (job.folder, theirs))
            assert [example.prompt.tolist() for example in ours] == [example.prompt.tolist() for example in expected]
            np.testing.assert_allclose([e.scores for e in ours], [e.scores for e in expected], atol=1e-4)

    with (tmp_path / "study" / "results.csv").open(newline="") as file:
        ours = [*csv.DictReader(file)]
    expected = [row for row in rows(finished) if row["arm"] in ("sft", "golden")]
    assert [(row["arm"], row["step"]) for row in ours] == [(row["arm"], row["step"]) for row in expected]
    for row, other in zip(ours, expected, strict=True):
        for name in (name for name in row if name not in ("arm", "loss") and row[name]):
            np.testing.assert_allclose(float(row[name]), float(other[name]), rtol=2e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_what_one_process_refuses_both_refuse(tmp_path):
    """Only the second process is told to read the dataset, and it does not exist."""
    statuses, outputs = run_processes(tmp_path, [NANO], [[*NANO, "--config.prepared=nowhere"]])
    assert statuses == [2, 2], outputs
    first, second = (error.strip().splitlines()[-1] for _, error in outputs)
    assert second.startswith("error: ") and "nowhere/train" in second
    assert first == f"error: process 1: {second.removeprefix('error: ')}"
    assert not (tmp_path / "study").exists()
