"""Shows prepared data: decoded text with its boundaries, and a picture of the lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np

from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.records.example import Example
from alignment_gap.data.text.vocabulary import Vocabulary
from alignment_gap.errors import UserError

# Ids shown at each end of a sequence.
_EDGE = 4


def preview(dataset: Dataset, vocabulary: Vocabulary, count: int) -> str:
    """`count` examples, spread evenly over a dataset, as text."""
    numbers = sorted({int(i) for i in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))})
    return "\n".join(_example_text(dataset[i], i, len(dataset), vocabulary) for i in numbers)


def visible_text(ids: Iterable[SupportsIndex], vocabulary: Vocabulary) -> str:
    """The text of `ids` with every special id written out, such as `<eos:1>`."""
    specials = {vocabulary.pad_id: "pad", vocabulary.eos_id: "eos"}
    if vocabulary.bos_id is not None:
        specials[vocabulary.bos_id] = "bos"

    def name(index: int) -> str:
        if index in specials:
            return f"<{specials[index]}:{index}>"
        if index >= vocabulary.size - vocabulary.extra_ids:
            return f"<{vocabulary.decode([index]).strip('<>')}:{index}>"
        return ""

    parts = []
    for special, group in itertools.groupby(map(int, ids), key=name):
        run = list(group)
        parts += [special] * len(run) if special else [vocabulary.decode(run)]
    return " ".join(parts)


def lengths_picture(lengths: Mapping[str, Any]) -> bytes:
    """A PNG with the histograms of a card's `lengths`; raises UserError if the plotting package is not installed."""
    try:
        import altair as alt
        import vl_convert
    except ImportError as error:
        raise UserError(
            f'{error.name} draws the histogram and is not installed: pip install "alignment-gap[study]"'
        ) from error

    def bars(name: str) -> Any:
        found = lengths[name]
        width = found["bin_width"]
        values = [
            {"from": i * width, "to": (i + 1) * width, "count": count} for i, count in enumerate(found["histogram"])
        ]
        chart = alt.Chart(alt.Data(values=values), width=360, height=180)
        marks = chart.mark_bar(color="#0072B2").encode(
            x=alt.X("from:Q", bin="binned", title="tokens"),
            x2="to:Q",
            y=alt.Y("count:Q", title=f"{name}s", axis=alt.Axis(tickMinStep=1)),
        )
        percentiles = [{"tokens": found[p], "p": p} for p in ("p50", "p90", "p99")]
        lines = alt.Chart(alt.Data(values=percentiles)).encode(x="tokens:Q")
        labels = lines.mark_text(align="left", dx=3, y=6, fontSize=10).encode(text="p:N")
        return (marks + lines.mark_rule(color="#606060", strokeDash=[3, 3]) + labels).properties(
            title=f"{name}s: median {found['p50']}, 90 % up to {found['p90']}, longest {found['max']} tokens"
        )

    return vl_convert.vegalite_to_png(alt.hconcat(bars("prompt"), bars("response")).to_dict(), scale=2.0)


def _example_text(example: Example, number: int, count: int, vocabulary: Vocabulary) -> str:
    lines = [
        f"example {number} of {count:,} (prompt id {example.prompt_id})",
        *_sequence(example.prompt, "prompt", vocabulary),
    ]
    for response, score in zip(example.responses, example.scores, strict=True):
        lines += _sequence(response, f"response, score {float(score):g}", vocabulary)
    return "\n".join(lines) + "\n"


def _sequence(ids: np.ndarray, name: str, vocabulary: Vocabulary) -> list[str]:
    shown = [str(i) for i in ids.tolist()]
    if len(shown) > 2 * _EDGE:
        shown = [*shown[:_EDGE], "...", *shown[-_EDGE:]]
    text = visible_text(ids.tolist(), vocabulary).splitlines()
    return [f"  {name}, {len(ids)} tokens: {' '.join(shown)}", *(f"    | {line}" for line in text)]
