"""Data: the batch type, vocabularies, datasets on disk, the offline source, and the tasks that a study runs on.

A task (`posts_task`, generated from a seed, or `human_pairs_task`, read from a file) gives examples; `write_dataset`
and `open_dataset` keep them in a folder of records with an index card; `offline_source` turns either into the
PreferenceBatch of any step. Names are imported at their first use, so that importing this package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment_gap.data.batch import PreferenceBatch, length_mask
    from alignment_gap.data.buckets import choose_buckets, lengths_of
    from alignment_gap.data.collation import Examples
    from alignment_gap.data.prefetch import Prefetched
    from alignment_gap.data.records import (
        Card,
        Dataset,
        Example,
        close_dataset,
        collate,
        derived,
        examples_of,
        open_dataset,
        verify_dataset,
        write_chunk,
        write_dataset,
    )
    from alignment_gap.data.source import OfflineSource, offline_source
    from alignment_gap.data.task import (
        HumanPairsTaskConfig,
        PostsTaskConfig,
        Rubric,
        Task,
        human_pairs_task,
        posts_task,
        rubric_preference,
    )
    from alignment_gap.data.vocabulary import (
        EncodingError,
        SentencePieceVocabulary,
        Vocabulary,
        WordVocabulary,
        extra_id,
        load_vocabulary,
    )

_HOME = {
    "batch": ("PreferenceBatch", "length_mask"),
    "buckets": ("choose_buckets", "lengths_of"),
    "collation": ("Examples",),
    "prefetch": ("Prefetched",),
    "records": (
        "Card",
        "Dataset",
        "Example",
        "close_dataset",
        "collate",
        "derived",
        "examples_of",
        "open_dataset",
        "verify_dataset",
        "write_chunk",
        "write_dataset",
    ),
    "source": ("OfflineSource", "offline_source"),
    "task": (
        "HumanPairsTaskConfig",
        "PostsTaskConfig",
        "Rubric",
        "Task",
        "human_pairs_task",
        "posts_task",
        "rubric_preference",
    ),
    "vocabulary": (
        "EncodingError",
        "SentencePieceVocabulary",
        "Vocabulary",
        "WordVocabulary",
        "extra_id",
        "load_vocabulary",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = [
    "Card",
    "Dataset",
    "EncodingError",
    "Example",
    "Examples",
    "HumanPairsTaskConfig",
    "OfflineSource",
    "PostsTaskConfig",
    "PreferenceBatch",
    "Prefetched",
    "Rubric",
    "SentencePieceVocabulary",
    "Task",
    "Vocabulary",
    "WordVocabulary",
    "choose_buckets",
    "close_dataset",
    "collate",
    "derived",
    "examples_of",
    "extra_id",
    "human_pairs_task",
    "length_mask",
    "lengths_of",
    "load_vocabulary",
    "offline_source",
    "open_dataset",
    "posts_task",
    "rubric_preference",
    "verify_dataset",
    "write_chunk",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
