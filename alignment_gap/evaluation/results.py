"""Tables of measured values: rows of means with their intervals, as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from alignment_gap.evaluation.intervals import mean_interval

Outcomes = Mapping[str, np.ndarray]
"""For each metric, a value for each of N prompts or N pairs."""


def means(outcomes: Outcomes, metrics: Sequence[str], seed: int = 0) -> dict[str, float]:
    """The mean of each metric, and the ends of its interval as METRIC_low and METRIC_high; nan if not measured.

    Examples with the value nan are left out: a judge gave no answer for them.
    """
    row: dict[str, float] = {}
    for metric in metrics:
        values = outcomes.get(metric, np.array([]))
        interval = mean_interval(values[~np.isnan(values)], seed=seed)
        row |= {metric: interval.value, f"{metric}_low": interval.low, f"{metric}_high": interval.high}
    return row


def csv_text(rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> str:
    """The rows as CSV with a header; a nan is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if _is_nan(value) else value for name, value in row.items()})
    return text.getvalue()


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)
