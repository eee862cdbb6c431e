"""All numbers that a study measured, example by example, in one file; later analyses need no other files."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, write_bytes
from alignment_gap.study.analysis import IDENTITY, CheckpointResult

OUTCOMES = "outcomes.npz"
# Win rates and accuracies of one example are 0, 0.5 or 1; they are stored as twice their value.
_HALVES = np.array([0.0, 0.5, 1.0])


def write_outcomes(folder: AnyPath, results: Sequence[CheckpointResult]) -> None:
    """Writes outcomes.npz: the settings of C checkpoints, and their outcomes for each metric.

    If K checkpoints have a metric on N examples each, it is stored in two arrays: "METRIC N" of shape [K, N], in the
    smallest dtype that keeps every value (uint8 for twice the value, float32 or float64); and "METRIC N rows",
    int64[K], the numbers of these checkpoints.
    """
    columns: dict[str, np.ndarray] = {name: np.array([getattr(r, name) for r in results]) for name in IDENTITY}
    rows: dict[str, list[int]] = {}
    for row, result in enumerate(results):
        for metric, values in result.outcomes.items():
            rows.setdefault(f"{metric} {len(values)}", []).append(row)
    for key, chosen in rows.items():
        metric = key.partition(" ")[0]
        columns[key] = _packed(np.stack([results[row].outcomes[metric] for row in chosen]))
        columns[f"{key} rows"] = np.array(chosen)
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **columns)
    write_bytes(folder / OUTCOMES, content.getvalue())


def read_outcomes(folder: AnyPath) -> list[CheckpointResult]:
    """The checkpoints of outcomes.npz in their order; raises UserError if the file is missing or damaged."""
    path = folder / OUTCOMES
    if not path.exists():
        raise UserError(f"{folder} has no {OUTCOMES}: write its report again with alignment-gap study --job=report")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return _results({name: arrays[name] for name in arrays.files})
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError):
        raise UserError(f"{path} is damaged: write the report again with alignment-gap study --job=report") from None


def _results(columns: Mapping[str, np.ndarray]) -> list[CheckpointResult]:
    outcomes: list[dict[str, np.ndarray]] = [{} for _ in columns["step"]]
    for key in columns:
        metric, _, examples = key.partition(" ")
        if examples and not examples.endswith("rows"):
            for row, values in zip(columns[f"{key} rows"], _unpacked(columns[key]), strict=True):
                outcomes[row][metric] = values
    identities = zip(*(columns[name].tolist() for name in IDENTITY), strict=True)
    return [
        CheckpointResult(**dict(zip(IDENTITY, identity, strict=True)), outcomes=measured)
        for identity, measured in zip(identities, outcomes, strict=True)
    ]


def _packed(values: np.ndarray) -> np.ndarray:
    """The values in the smallest dtype that keeps them; twice the values if all are 0, 0.5 or 1."""
    if np.isin(values, _HALVES).all():
        return (2 * values).astype(np.uint8)
    smaller = values.astype(np.float32)
    return smaller if np.array_equal(smaller, values, equal_nan=True) else values


def _unpacked(values: np.ndarray) -> np.ndarray:
    return values / 2 if values.dtype == np.uint8 else values
