"""The smallest study that runs every job: its config, its graph, and its folder when it is finished."""

import json
import pathlib
import sys

import pytest

# Tests import nano and the like from this folder, job_runs from that of the jobs and process_runs from that of the
# commands, however pytest was started.
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "jobs"), str(HERE.parent / "cli")]

from nano import nano_study

from alignment_gap.study.run import open_studies, run_study


@pytest.fixture(scope="session")
def config():
    return nano_study()


@pytest.fixture
def graph(config, tmp_path):
    """The graph of a study in a folder where nothing was run."""
    return open_studies(config, tmp_path)[0].graph


@pytest.fixture(scope="session")
def finished(config, tmp_path_factory):
    """A finished study, whose pictures are placeholders; two of its jobs ran at a time."""
    (study,) = open_studies(config, tmp_path_factory.mktemp("study"))
    with pytest.MonkeyPatch.context() as patch:
        do_not_draw(patch)
        run_study(study, at_once=2, say=lambda line: None)
    return study


@pytest.fixture
def undrawn(monkeypatch):
    """Reports whose pictures are placeholders."""
    do_not_draw(monkeypatch)


def do_not_draw(patch):
    """A picture is what would be drawn, and the library is none: drawing takes longer than the rest of a report."""
    patch.setattr("alignment_gap.evaluation.charts.png", lambda spec, scale=2.0: json.dumps(spec).encode())
    patch.setattr("alignment_gap.jobs.evaluate.kl_picture", lambda rows, metrics: repr(metrics).encode())
    patch.setattr("vl_convert.javascript_bundle", lambda code: code)
