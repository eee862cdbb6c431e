"""Checkpoints of ours and of other libraries: their networks, and their tensors read and written one at a time."""

from alignment_gap.checkpoints.layout import (
    CHECKPOINTS,
    TOKENIZER,
    Stored,
    complete_steps,
    end_ids,
    find_checkpoint,
    known_network,
    open_checkpoint,
    pad_token,
    read_digest,
    read_network,
    tokenizer_of,
    write_checkpoint,
)
from alignment_gap.checkpoints.network import Network, agreed_model, check_policy, check_vocabulary, run_like
from alignment_gap.checkpoints.tensors import Entry, Tensor, check_entries, check_shapes, exported, imported

__all__ = [
    "CHECKPOINTS",
    "TOKENIZER",
    "Entry",
    "Network",
    "Stored",
    "Tensor",
    "agreed_model",
    "check_entries",
    "check_policy",
    "check_shapes",
    "check_vocabulary",
    "complete_steps",
    "end_ids",
    "exported",
    "find_checkpoint",
    "imported",
    "known_network",
    "open_checkpoint",
    "pad_token",
    "read_digest",
    "read_network",
    "run_like",
    "tokenizer_of",
    "write_checkpoint",
]
