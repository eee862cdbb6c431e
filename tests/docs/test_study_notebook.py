"""notebooks/study.ipynb runs on the files of a study, and finds the planted gap."""

import json
import math
import pathlib

import numpy as np
import pytest

from alignment_gap.evaluation import charts
from alignment_gap.study.analysis import CheckpointResult
from alignment_gap.study.config import StudyConfig
from alignment_gap.study.report import JudgeFacts, ReportContext, write_report

ROOT = pathlib.Path(__file__).parents[2]


def planted(arm, height, **identity):
    """A run whose win rate at a KL of k nats is 0.5 + height * k, on every example."""
    return [
        CheckpointResult(arm, "ipo", 0.1, 1e-3, 0, step, outcomes, **identity)
        for step in (1, 2, 4)
        for outcomes in [{"kl": np.full(8, float(step)), "win_rate": np.full(8, 0.5 + height * step)}]
    ]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Writes the files of a study with its own functions, runs the notebook on them, and returns its names."""
    monkeypatch.setattr(charts, "png", lambda spec, scale=2.0: b"")

    def run(results):
        folder = tmp_path / "runs" / "study"
        judges = [JudgeFacts(0, "golden, held-out human labels", {"the labels": 0.75})]
        write_report(folder, results, ReportContext(StudyConfig(), judges=judges))
        (tmp_path / "notebooks").mkdir()
        job = folder / "jobs" / "seed0-online-ipo-0123456789ab"
        job.mkdir(parents=True)
        (job / "job.json").write_text(json.dumps({"kind": "policy", "loss.name": "ipo"}))
        (job / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 2.0, "pairs_per_second": 12.0}) + "\n")
        monkeypatch.chdir(tmp_path / "notebooks")
        scope: dict = {}
        for cell in json.loads((ROOT / "notebooks" / "study.ipynb").read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), scope)
        return scope

    return run


@pytest.fixture
def origin():
    return CheckpointResult("sft", "sft", math.nan, math.nan, 0, 0, {"kl": np.zeros(8), "win_rate": np.full(8, 0.5)})


def test_notebook_finds_the_planted_gap(ran, origin, capsys):
    scope = ran([origin, *planted("golden", 0.02), *planted("online", 0.1), *planted("offline", 0.05)])
    (comparison,) = scope["comparisons"]
    assert (comparison.first, comparison.second) == (("online", "ipo"), ("offline", "ipo"))
    # Budgets are equally spaced in sqrt(KL), from 1 to 4 nats; the gap is 0.05 times their mean.
    np.testing.assert_allclose(comparison.mean_gap.value, 0.05 * np.mean(np.linspace(1, 2, 32) ** 2), atol=1e-6)
    assert scope["best"]["ipo", "online", 0].checkpoint.step == 4
    said = capsys.readouterr().out
    assert "IPO: at equal KL online beats offline." in said and "between their peaks, at any KL, it is +20.0" in said
    assert "cannot be told   +11.7 points" in said and "At equal KL online is better than offline." in said
    assert "seed 0  golden, held-out human labels: the labels 75.0%" in said
    assert "Run seed0-online-ipo, Loss IPO, Jobs 1, Steps 4, Pairs/s 12," in said


def test_notebook_draws_the_main_figure_and_the_curves(ran, origin):
    scope = ran([origin, *planted("online", 0.1), *planted("offline", 0.05)])
    drawn = scope["drawn"]["figure_4"].spec["data"]["values"]
    assert sorted((row["arm"], row["step"]) for row in drawn if not row.get("start")) == [
        *(("offline", step) for step in (1, 2, 4)),
        *(("online", step) for step in (1, 2, 4)),
        ("sft", 0),
    ]
    assert [row["loss"] for row in scope["training"].spec["data"]["values"]] == [2.0]


@pytest.mark.slow
def test_runs_of_other_lengths_and_sizes_are_not_pooled(ran, origin, capsys):
    """A run of five times the steps is a run of its own; another size is another study."""
    larger = [CheckpointResult(*("sft", "sft", math.nan, math.nan, 0, 0), origin.outcomes, size="large", parameters=90)]
    larger += planted("online", 0.01, size="large", parameters=90)
    scope = ran(
        [
            *(origin, *planted("online", 0.1), *planted("offline", 0.05)),
            *(*planted("offline", 0.06, steps_factor=5), *larger),
        ]
    )
    runs = scope["evidence"].runs(("offline", "ipo"), "win_rate")[0]
    assert [[result.steps_factor for result in run[1:]] for run in runs] == [[1, 1, 1], [5, 5, 5]]
    assert len(scope["evidence"].runs(("online", "ipo"), "win_rate")[0]) == 1
    assert "sizes: 0 parameters, 90 parameters" in capsys.readouterr().out


def test_without_a_second_arm_there_is_nothing_to_compare(ran, origin):
    assert ran([origin, *planted("online", 0.1)])["comparisons"] == []
