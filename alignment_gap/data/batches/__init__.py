"""From datasets to the batch of any step: order, buckets, packing, collation, reading ahead."""

from alignment_gap.data.batches.batch import PreferenceBatch, check_token_ids, length_mask
from alignment_gap.data.batches.buckets import Bucket, choose_buckets
from alignment_gap.data.batches.collation import Examples, collate, examples_of
from alignment_gap.data.batches.offline import OfflineSource, offline_source
from alignment_gap.data.batches.prefetch import Prefetched

__all__ = [
    "Bucket",
    "Examples",
    "OfflineSource",
    "PreferenceBatch",
    "Prefetched",
    "check_token_ids",
    "choose_buckets",
    "collate",
    "examples_of",
    "length_mask",
    "offline_source",
]
