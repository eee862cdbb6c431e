"""notebooks/study.ipynb runs on the results.csv that a study writes, and finds the gap that was planted in it."""

import json
import math
import pathlib

import numpy as np
import pytest

from alignment_gap.evaluation.results import csv_text
from alignment_gap.study.analysis import COLUMNS, CheckpointResult, results_table

ROOT = pathlib.Path(__file__).parents[2]


def planted(arm, height):
    """A run whose win rate at a KL of k nats is height * k + 0.5, with examples that scatter about it."""
    noise = np.linspace(-0.1, 0.1, 8)
    return [
        CheckpointResult(arm, "ipo", 0.1, 1e-3, 0, step, {"kl": noise + step, "win_rate": noise + 0.5 + height * step})
        for step in (1, 2, 4)
    ]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs the notebook on results, as a study writes them, and gives its names."""

    def run(results):
        folder = tmp_path / "runs" / "study"
        folder.mkdir(parents=True)
        (tmp_path / "notebooks").mkdir()
        (folder / "results.csv").write_text(csv_text(results_table(results), COLUMNS))
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
    # Budgets are equally spaced in the root, from 1 to 4 nats: the gap is 0.05 of their mean.
    ((pair, gap),) = scope["gaps"].items()
    assert pair == ("ipo", "online", "offline")
    np.testing.assert_allclose(gap, 0.05 * np.mean(np.linspace(1, 2, 32) ** 2), atol=1e-6)
    assert scope["best"]["ipo", "online", 0]["step"] == "4"
    assert "between the peaks +20.0" in capsys.readouterr().out


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
