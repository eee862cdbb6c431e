"""The smallest study that runs every job: its config, its graph, and its folder after it has finished."""

import json
import pathlib
import sys

import pytest

# Makes nano and others (here), job_runs (tests/jobs) and process_runs (tests/cli) importable, however pytest was
# started.
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "jobs"), str(HERE.parent / "cli")]

from nano import nano_study

from alignment_gap.study.run import open_studies, run_study


@pytest.fixture(scope="session")
def config():
    return nano_study()


@pytest.fixture
def graph(config, tmp_path):
    """The graph of a study in an empty folder."""
    return open_studies(config, tmp_path)[0].graph


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """A finished study with placeholders for pictures. Two of its jobs ran at a time."""
    (study,) = open_studies(config, tmp_path_factory.mktemp("study"))
    with pytest.MonkeyPatch.context() as patch:
        do_not_draw(patch)
        run_study(study, at_once=2, say=lambda line: None)
    return study


@pytest.fixture
def undrawn(monkeypatch):
    """Reports get placeholders for pictures."""
    do_not_draw(monkeypatch)


def do_not_draw(patch):
    """A picture becomes its specification, and the page has no drawing library; drawing would take most of the time."""
    patch.setattr("alignment_gap.evaluation.charts.png", lambda spec, scale=2.0: json.dumps(spec).encode())
    patch.setattr("alignment_gap.jobs.evaluate.kl_picture", lambda rows, metrics: repr(metrics).encode())
    patch.setattr("vl_convert.javascript_bundle", lambda code: code)
