"""What docs/results and README say of the studies follows from the measurements that are kept beside them."""

import importlib.util
import pathlib

import pytest

from alignment_gap.evaluation.results import csv_text
from alignment_gap.folders import at
from alignment_gap.study import analysis
from alignment_gap.study.claims import answers, claims_of
from alignment_gap.study.estimates import Evidence
from alignment_gap.study.outcomes import read_outcomes
from alignment_gap.study.report import CLAIM_COLUMNS, claim_record, read_facts

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
STUDIES = sorted(path.parent.name for path in RESULTS.glob("*/claims.csv"))

_spec = importlib.util.spec_from_file_location("make_results", RESULTS / "make.py")
make_results = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_results)


@pytest.fixture(scope="module", params=STUDIES)
def study(request):
    return RESULTS / request.param


@pytest.fixture(scope="module")
def measured(study):
    """The checkpoints of all pieces, in the order of their seeds."""
    pieces = [read_outcomes(at(piece)) for piece in make_results.pieces_of(study)]
    return [result for piece in sorted(pieces, key=lambda piece: piece[0].seed) for result in piece]


def test_the_table_is_that_of_what_was_measured(study, measured):
    table = analysis.results_table(measured)
    assert (study / "results.csv").read_text(encoding="utf-8") == csv_text(table, analysis.COLUMNS)


def test_the_verdicts_follow_from_what_was_measured(study, measured):
    claims = claims_of(read_facts(at(study)).config.claims)
    answered = map(claim_record, answers(Evidence(measured), claims))
    assert (study / "claims.csv").read_text(encoding="utf-8") == csv_text(answered, CLAIM_COLUMNS)


def test_every_figure_that_a_page_shows_is_there(study):
    pictures = {path.name for path in (study / "figures").glob("*.png")}
    assert "figure_4.png" in pictures


def test_readme_has_the_claims_of_the_main_study():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert make_results.with_claims(text, RESULTS / make_results.MAIN) == text
    assert "| At equal KL online is better than offline. | 1 | " in text
