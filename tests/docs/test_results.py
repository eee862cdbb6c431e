"""The numbers in docs/results and README follow from the measurements in docs/results."""

import dataclasses
import importlib.util
import math
import pathlib
import re
import shutil

import numpy as np
import pytest

from alignment_gap.configuration import from_dict
from alignment_gap.evaluation.results import csv_text
from alignment_gap.folders import at
from alignment_gap.study import analysis
from alignment_gap.study.analysis import CheckpointResult
from alignment_gap.study.arms import arms_of
from alignment_gap.study.claims import answers, claims_of
from alignment_gap.study.config import StudyConfig
from alignment_gap.study.estimates import Evidence
from alignment_gap.study.findings import over_optimisation_fits, study_comparisons
from alignment_gap.study.outcomes import read_outcomes
from alignment_gap.study.report import (
    CLAIM_COLUMNS,
    COMPARISON_COLUMNS,
    FIT_COLUMNS,
    JudgeFacts,
    ReportContext,
    claim_record,
    comparison_record,
    fit_record,
    read_facts,
    write_report,
)

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
    """The checkpoints of all pieces, ordered by seed."""
    pieces = [read_outcomes(at(piece)) for piece in make_results.pieces_of(study)]
    return [result for piece in sorted(pieces, key=lambda piece: piece[0].seed) for result in piece]


@pytest.mark.slow
def test_the_table_is_that_of_what_was_measured(study, measured):
    table = analysis.results_table(measured)
    assert (study / "results.csv").read_text(encoding="utf-8") == csv_text(table, analysis.COLUMNS)


@pytest.mark.slow
def test_verdicts_gaps_and_fits_follow_from_what_was_measured(study, measured):
    evidence, config = Evidence(measured), read_facts(at(study)).config
    arms = arms_of((*config.arms.names, *config.arms.further))
    tables = {
        "claims": csv_text(map(claim_record, answers(evidence, claims_of(config.claims))), CLAIM_COLUMNS),
        "comparisons": csv_text(map(comparison_record, study_comparisons(evidence, arms)), COMPARISON_COLUMNS),
        "fits": csv_text([fit_record(*each) for each in over_optimisation_fits(evidence, arms)], FIT_COLUMNS),
    }
    for name, table in tables.items():
        assert (study / f"{name}.csv").read_text(encoding="utf-8") == table, name


def test_every_figure_that_a_page_shows_is_there(study):
    pictures = {path.name for path in (study / "figures").glob("*.png")}
    assert "figure_4.png" in pictures


@pytest.mark.slow
@pytest.mark.skipif(make_results.MAIN not in STUDIES, reason="the main study has run for fewer than two seeds")
def test_readme_has_the_claims_of_the_main_study():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert make_results.between_marks(text, make_results.claims_markdown(RESULTS / make_results.MAIN)) == text
    assert "| At equal KL online is better than offline. | 1 | " in text


def test_the_page_has_the_comparisons_that_no_claim_is_about():
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    table = make_results.comparisons_markdown(RESULTS / make_results.MAIN)
    assert make_results.between_marks(text, table, "comparisons") == text
    assert (
        "| Semi-online | `refresh_4` \u2212 `online` | " in text and "`high_beta` \u2212 `offline` | \u2013 | " in text
    )


@pytest.mark.parametrize("name", [name for name in make_results.REAL if name in STUDIES])
def test_the_page_has_the_claims_of_the_studies_on_human_pairs(name):
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    table = make_results.claims_markdown(RESULTS / name)
    assert make_results.between_marks(text, table, name) == text
    assert f"<!-- {name}: made by `make results` -->\n\n| The paper | figure | here | " in text


def test_the_golden_models_of_the_main_study_agree_with_the_rubric():
    """The study is about its golden model; no seed is chosen or left out."""
    facts = [read_facts(at(piece)).judges for piece in make_results.pieces_of(RESULTS / make_results.MAIN)]
    held_out = [judge for judges in facts for judge in judges if judge.measured == "golden, held-out human labels"]
    assert [judge.seed for judge in held_out] == [0, 1, 2, 3, 4]
    assert min(judge.shares["rubric"] for judge in held_out) >= 0.85


def test_the_page_has_the_claims_of_all_kinds_side_by_side():
    kinds, text = make_results.kinds_made(RESULTS), (RESULTS / "README.md").read_text(encoding="utf-8")
    assert make_results.between_marks(text, make_results.kinds_markdown(kinds)) == text
    assert "| The paper | biased | easy | long | noisy | short |" in text
    assert "| At equal KL online is better than offline. | agrees: " in text


@pytest.mark.parametrize("piece", sorted(RESULTS.glob("*/seed_*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_piece_is_its_seed_of_todays_config(piece):
    """Otherwise measurements of an old config would be pooled with others."""
    facts, measured = read_facts(at(piece)), read_outcomes(at(piece))
    assert analysis.seeds_of(measured) == [facts.config.seed] and piece.name == f"seed_{facts.config.seed}"
    # The folder kinds_biased has the study of configs/study/kinds.py:biased.
    name, *kind = piece.parent.name.split("_", 1)
    spec = importlib.util.spec_from_file_location("config", ROOT / "configs" / "study" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    today = from_dict(StudyConfig, module.get_config(*kind).to_dict())
    if today.task.source.location is None:  # The user gives the pairs and their vocabulary, as files of any name.
        given = facts.config.task
        source = dataclasses.replace(today.task.source, location=given.source.location)
        task = dataclasses.replace(today.task, source=source, vocabulary=given.vocabulary)
        today = dataclasses.replace(today, task=task)
    # The implementation of attention does not change the measurements, nor does a template that writes no conversation.
    known = today.policy is not None and facts.config.policy is not None
    policy = dataclasses.replace(today.policy, attention=facts.config.policy.attention) if known else today.policy
    source = dataclasses.replace(today.task.source, template=facts.config.task.source.template)
    task = dataclasses.replace(today.task, source=source)
    assert dataclasses.replace(today, seed=facts.config.seed, seeds=1, policy=policy, task=task) == facts.config


KL = (1.0, 4.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study made of two pieces."""
    folder = tmp_path_factory.mktemp("results") / "paper"
    settings = {"sft": ("sft", math.nan, math.nan), "online": ("ipo", 0.1, 1e-3), "offline": ("ipo", 0.1, 1e-3)}
    rates = (("sft", 0.0, 0.1), *((arm, kl, rate) for arm, rate in (("online", 0.8), ("offline", 0.3)) for kl in KL))
    for seed in (0, 1):
        # Every example equals the mean, so no estimate has noise.
        results = [
            CheckpointResult(arm, *settings[arm], seed, int(kl), {"kl": np.full(8, kl), "win_rate": np.full(16, rate)})
            for arm, kl, rate in rates
        ]
        judges = [JudgeFacts(seed, "golden, held-out human labels", {"the labels": 0.8})]
        piece = folder / f"seed_{seed}"
        write_report(at(piece), results, ReportContext(StudyConfig(seed=seed), judges=judges))
    make_results.make(folder)
    return folder


@pytest.mark.slow
def test_a_study_is_made_from_its_pieces(made):
    assert {path.name for path in made.iterdir()} == {"seed_0", "seed_1", *make_results.MADE}
    assert (made / "figures" / "figure_4.png").read_bytes().startswith(b"\x89PNG")
    make_results.make(made)  # Make it again, over the existing files.


@pytest.mark.slow
def test_studies_are_drawn_side_by_side(made, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(made, other)
    for _ in range(2):  # The second time over the existing files.
        make_results.compare([made, other], tmp_path / "both")
    pictures = {path.name for path in (tmp_path / "both" / "figures").iterdir()}
    assert {"claims.png", "figure_4_ipo_win_rate.png"} <= pictures


def test_every_picture_of_the_page_is_there():
    shown = re.findall(r"\]\(([^)]+\.(?:png|csv))\)", (RESULTS / "README.md").read_text(encoding="utf-8"))
    assert len(shown) > 5 and [name for name in shown if not (RESULTS / name).is_file()] == []


def test_a_study_without_pieces_is_refused_by_name():
    with pytest.raises(SystemExit, match="kinds_none has 0 pieces"):
        make_results.main(["kinds_none"])


def test_the_claims_stand_between_their_marks(made):
    page = "before\n<!-- claims: made by `make results` -->\nstale words\n<!-- end of claims -->\nafter\n"
    text = make_results.between_marks(page, make_results.claims_markdown(made))
    assert text.startswith("before\n<!-- claims") and text.endswith("<!-- end of claims -->\nafter\n")
    assert "stale words" not in text
    (row,) = (line for line in text.splitlines() if "At equal KL online is better than offline." in line)
    assert "| agrees | +50.0 points (+41.1 to +58.9) | 2 | 12.8 points |" in row
    # A claim without measurements has no row.
    assert "Pairs with one side of SFT" not in text
    assert make_results.between_marks(text, make_results.claims_markdown(made)) == text
