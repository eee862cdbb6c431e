"""Datasets on disk: records, cards, lengths, previews, and stored log-probs."""

from alignment_gap.data.records.dataset import (
    Card,
    Dataset,
    close_dataset,
    derived,
    open_dataset,
    verify_dataset,
    write_chunk,
    write_dataset,
)
from alignment_gap.data.records.example import Example
from alignment_gap.data.records.lengths import lengths_of

__all__ = [
    "Card",
    "Dataset",
    "Example",
    "close_dataset",
    "derived",
    "lengths_of",
    "open_dataset",
    "verify_dataset",
    "write_chunk",
    "write_dataset",
]
