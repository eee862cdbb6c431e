"""Measurements as rows, as CSV."""

import csv
import io
import math

import numpy as np

from alignment_gap.evaluation.intervals import mean_interval
from alignment_gap.evaluation.results import csv_text, means


def test_a_row_has_the_mean_of_each_metric_with_its_ends():
    outcomes = {"kl": np.linspace(0.0, 4.0, 33), "win_rate.rubric.sft": np.array([1.0, 0.0, 0.5, 1.0])}
    row = means(outcomes, ["win_rate.rubric.sft", "kl"])
    assert list(row) == [
        "win_rate.rubric.sft",
        "win_rate.rubric.sft_low",
        "win_rate.rubric.sft_high",
        "kl",
        "kl_low",
        "kl_high",
    ]
    assert row["win_rate.rubric.sft"] == 0.625 and math.isclose(row["kl"], 2.0)
    for name, values in outcomes.items():
        interval = mean_interval(values)
        assert (row[name], row[f"{name}_low"], row[f"{name}_high"]) == (interval.value, interval.low, interval.high)
        assert interval.low < interval.value < interval.high


def test_a_metric_that_was_not_measured_is_nan_with_both_ends():
    row = means({"kl": np.ones(4)}, ["kl", "accuracy"])
    assert row["kl"] == row["kl_low"] == row["kl_high"] == 1.0
    assert all(math.isnan(row[f"accuracy{end}"]) for end in ("", "_low", "_high"))


def test_a_value_that_a_judge_did_not_give_is_left_out():
    values = np.array([1.0, np.nan, 0.0, 1.0, np.nan, 0.5])
    row, interval = means({"win_rate.model.sft": values}, ["win_rate.model.sft"]), mean_interval(values[[0, 2, 3, 5]])
    assert [*row.values()] == [interval.value, interval.low, interval.high] and row["win_rate.model.sft"] == 0.625


def test_the_seed_is_that_of_the_interval():
    outcomes = {"kl": np.arange(20.0)}
    assert means(outcomes, ["kl"], seed=1) == means(outcomes, ["kl"], seed=1)
    assert means(outcomes, ["kl"], seed=1) != means(outcomes, ["kl"], seed=2)


def test_csv_is_what_was_given_and_an_empty_field_for_nan():
    rows = [
        {"run": "runs/ipo", "step": 4, "kl": 0.25, "kl_low": math.nan, "kept out": 3},
        {"run": 'a "quoted", one', "step": 8, "kl": 1 / 3, "kl_low": -1e-9},
    ]
    text = csv_text(rows, ["run", "step", "kl", "kl_low"])
    lines = text.split("\n")
    assert lines[0] == "run,step,kl,kl_low" and lines[1] == "runs/ipo,4,0.25," and lines[-1] == ""
    (_, second) = csv.DictReader(io.StringIO(text))
    assert second["run"] == 'a "quoted", one' and int(second["step"]) == 8
    # CSV has every digit, so reading it returns the same number.
    assert float(second["kl"]) == 1 / 3 and float(second["kl_low"]) == -1e-9


def test_csv_of_no_rows_has_its_header():
    assert csv_text([], ["step", "kl"]) == "step,kl\n"
