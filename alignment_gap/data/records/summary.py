"""Summarises the lengths of sequences: exact percentiles and a histogram, from counts that can be added up."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping
from typing import Any

# Maximum number of bins in a histogram; their width is the smallest power of two that allows it.
BINS = 32


def summarise_lengths(counts: Mapping[int, int]) -> dict[str, Any]:
    """The card's summary of lengths in tokens.

    Args:
      counts: the number of sequences of each length; at least one sequence.

    Returns:
      mean: mean length in tokens, rounded to two decimal places.
      p50, p90, p99, max: the smallest length that 50 %, 90 %, 99 % or all of the sequences do not exceed.
      bin_width: tokens in a bin of the histogram.
      histogram: number of sequences in each bin; bin i has the lengths from i * bin_width + 1 to (i + 1) * bin_width.
    """
    lengths = sorted(counts)
    ends = list(itertools.accumulate(counts[length] for length in lengths))
    total, longest = ends[-1], lengths[-1]
    # Integer arithmetic, so that 99 % of 100 is exactly 99.
    percentiles = {f"p{p}": lengths[bisect.bisect_left(ends, -(-p * total // 100))] for p in (50, 90, 99)}
    width = 1
    while width * BINS < longest:
        width *= 2
    histogram = [0] * (-(-longest // width))
    for length in lengths:
        histogram[(length - 1) // width] += counts[length]
    mean = sum(length * count for length, count in counts.items()) / total
    return {"mean": round(mean, 2), **percentiles, "max": longest, "bin_width": width, "histogram": histogram}
