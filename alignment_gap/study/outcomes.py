"""Every number that a study measured, example by example, as one file that later analyses read without its jobs."""

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
# Shares of one example are 0, 0.5 or 1: they are kept as twice their value.
_HALVES = np.array([0.0, 0.5, 1.0])


def write_outcomes(folder: AnyPath, results: Sequence[CheckpointResult]) -> None:
    """Writes outcomes.npz: C checkpoints with what tells them apart, and the outcomes of those that have a metric.

    A metric that K of the checkpoints have on N examples each is two arrays: "METRIC N" of shape [K, N], in the
    smallest dtype that keeps every value (uint8 for twice a share, float32, float64), and "METRIC N rows", int64[K].
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
        raise UserError(f"{folder} has no {OUTCOMES}: write its report anew by alignment-gap study --job=report")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return _results({name: arrays[name] for name in arrays.files})
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError):
        raise UserError(f"{path} is damaged: write the report anew by alignment-gap study --job=report") from None


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
    """The values in the smallest dtype that keeps them all; twice the values where they are shares."""
    if np.isin(values, _HALVES).all():
        return (2 * values).astype(np.uint8)
    smaller = values.astype(np.float32)
    return smaller if np.array_equal(smaller, values, equal_nan=True) else values


def _unpacked(values: np.ndarray) -> np.ndarray:
    return values / 2 if values.dtype == np.uint8 else values
