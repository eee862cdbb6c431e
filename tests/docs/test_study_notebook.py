"""notebooks/study.ipynb runs on a results.csv and finds the gap that was planted in it."""

import json
import math
import pathlib

import numpy as np

from alignment_gap.study.analysis import CheckpointResult, results_table, write_csv

ROOT = pathlib.Path(__file__).parents[2]


def planted(arm, height):
    """A run whose win rate at a KL of k nats is height * k + 0.5, with examples that scatter about it."""
    noise = np.linspace(-0.1, 0.1, 8)
    return [
        CheckpointResult(arm, "ipo", 0.1, 1e-3, 0, step, {"kl": noise + step, "win_rate": noise + 0.5 + height * step})
        for step in (1, 2, 4)
    ]


def test_notebook_finds_the_planted_gap(tmp_path, monkeypatch, capsys):
    origin = CheckpointResult("sft", "sft", math.nan, 1e-3, 0, 0, {"kl": np.zeros(8), "win_rate": np.full(8, 0.5)})
    folder = tmp_path / "runs" / "study"
    folder.mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    write_csv(folder / "results.csv", results_table([origin, *planted("online", 0.1), *planted("offline", 0.05)]))
    monkeypatch.chdir(tmp_path / "notebooks")
    scope: dict = {}
    for cell in json.loads((ROOT / "notebooks" / "study.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    # Budgets are equally spaced in the root, from 1 to 4 nats: the gap is 0.05 of their mean.
    (gap,) = scope["gaps"].values()
    np.testing.assert_allclose(gap, 0.05 * np.mean(np.linspace(1, 2, 32) ** 2), atol=1e-6)
    assert scope["best"]["ipo", "online", 0]["step"] == "4"
    assert "between the peaks +20.0" in capsys.readouterr().out
