"""notebooks/study.ipynb runs on the files of a study, and finds the planted gap."""

import json
import math
import pathlib

import numpy as np
import pytest

from alignment_gap.evaluation.results import csv_text
from alignment_gap.study.analysis import COLUMNS, CheckpointResult, results_table
from alignment_gap.study.report import CLAIM_COLUMNS

ROOT = pathlib.Path(__file__).parents[2]


def planted(arm, height):
    """A run whose win rate at a KL of k nats is 0.5 + height * k. Its examples scatter about this mean."""
    noise = np.linspace(-0.1, 0.1, 8)
    return [
        CheckpointResult(arm, "ipo", 0.1, 1e-3, 0, step, {"kl": noise + step, "win_rate": noise + 0.5 + height * step})
        for step in (1, 2, 4)
    ]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Writes results as a study writes them, runs the notebook on them, and returns its names."""

    def run(results):
        folder = tmp_path / "runs" / "study"
        folder.mkdir(parents=True)
        (tmp_path / "notebooks").mkdir()
        (folder / "results.csv").write_text(csv_text(results_table(results), COLUMNS))
        row = {"claim": "online-beats-offline", "paper": "It is better.", "verdict": "agrees", "value": 0.25}
        (folder / "claims.csv").write_text(csv_text([row | {"low": 0.1, "high": 0.4}], CLAIM_COLUMNS))
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
    # Budgets are equally spaced in sqrt(KL), from 1 to 4 nats; the gap is 0.05 times their mean.
    ((pair, gap),) = scope["gaps"].items()
    assert pair == ("ipo", "online", "offline")
    np.testing.assert_allclose(gap, 0.05 * np.mean(np.linspace(1, 2, 32) ** 2), atol=1e-6)
    assert scope["best"]["ipo", "online", 0]["step"] == "4"
    said = capsys.readouterr().out
    assert "between the peaks +20.0" in said
    assert "agrees            0.250 (0.100 to 0.400)  It is better." in said
    assert "Run seed0-online-ipo, Loss IPO, Jobs 1, Steps 4, Pairs/s 12," in said


def test_notebook_draws_the_main_figure_and_the_curves(ran, origin):
    scope = ran([origin, *planted("online", 0.1), *planted("offline", 0.05)])
    drawn = scope["main"].spec["data"]["values"]
    assert sorted((row["arm"], row["step"]) for row in drawn if not row.get("start")) == [
        *(("offline", step) for step in (1, 2, 4)),
        *(("online", step) for step in (1, 2, 4)),
        ("sft", 0),
    ]
    assert [row["loss"] for row in scope["training"].spec["data"]["values"]] == [2.0]


def test_notebook_compares_every_pair_of_the_table(ran, origin):
    scope = ran([origin, *planted("online", 0.1), *planted("shuffled", 0.1), *planted("offline", 0.05)])
    assert set(scope["gaps"]) == {
        ("ipo", "online", "offline"),
        ("ipo", "online", "shuffled"),
        ("ipo", "shuffled", "offline"),
    }
    assert abs(scope["gaps"]["ipo", "online", "shuffled"]) < 1e-9


def test_without_a_second_arm_there_is_nothing_to_compare(ran, origin):
    assert ran([origin, *planted("online", 0.1)])["gaps"] == {}
