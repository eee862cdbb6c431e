"""Logical axis names, as in T5X, and the mesh axes that shard them: one table for each layout."""

from __future__ import annotations

from typing import NamedTuple

AXES = ("data", "fsdp", "model")

# (logical name of an array's axis, the mesh axis or axes that split it, or None to keep it whole). As in T5X, the rules
# apply in order, and a mesh axis splits only one axis of an array. For example, fsdp splits the width of parameters; it
# already splits the batch of activations, so their width stays whole. If a name has several rules, the first that fits
# counts.
Rule = tuple[str, str | tuple[str, ...] | None]
Rules = tuple[Rule, ...]

STANDARD: Rules = (
    ("batch", ("data", "fsdp")),
    ("cache_batch", ("data", "fsdp")),
    ("vocab", "model"),
    ("mlp", "model"),
    ("heads", "model"),
    ("kv_heads", "model"),
    ("embed", "fsdp"),
    # For the one of an adapter's `a` and `b` that has no "embed" axis.
    ("rank", "fsdp"),
    ("kv", None),
    ("length", None),
    ("kv_length", None),
    ("layers", None),
    ("relpos_buckets", None),
)
# Sequence parallelism: between attention and MLP, where nothing else uses the model axis, it splits the positions
# (2205.05198).
SEQUENCE: Rules = (*(rule for rule in STANDARD if rule[0] != "length"), ("length", "model"))

# The rules for a loop over tokens, for every layout. The mesh's fsdp axis is split in three: copies of the weights,
# fsdp and columns. To gather the weights for every token would take most of the time. So the weights stay, sharded
# along both of their axes, and the activations move, which are small for one token: the input of a product is sharded
# as the weights' rows are, and its result is summed over them. Each copy computes its own rows of the batch, and each
# of its devices draws for a part of them.
_WEIGHTS: Rules = (
    ("embed", "fsdp"),
    # On the way there: the rows that a copy's devices hold together.
    ("copied_embed", ("copies", "fsdp")),
    *((name, axes) for name in ("vocab", "mlp", "heads", "kv_heads") for axes in (("columns", "model"), "model")),
    ("batch", ("data", "copies", "fsdp")),
    ("batch", ("data", "copies")),
    ("rows", ("data", "copies")),
)
_ALL = ("data", "copies", "fsdp", "columns")
# The cache is split by heads, as the products that fill it are, so that attention moves nothing over the columns.
DECODING_BY_HEADS: Rules = (("draws", _ALL), ("cache_batch", _ALL[:-1]), *_WEIGHTS)
# With too few heads for this, the cache stays where the prompts were computed.
DECODING: Rules = (("draws", _ALL), ("cache_batch", _ALL), *_WEIGHTS)


class Layout(NamedTuple):
    """A table of rules, and default sizes of the mesh axes (data, fsdp, model).

    A size of -1 uses all remaining devices.
    """

    rules: Rules
    sizes: tuple[int, int, int]


# Most TPU hosts have four chips, so a model axis of four stays within one host.
LAYOUTS: dict[str, Layout] = {
    "data": Layout(STANDARD, (-1, 1, 1)),
    "fsdp": Layout(STANDARD, (1, -1, 1)),
    "tensor": Layout(STANDARD, (1, 1, -1)),
    "fsdp_tensor": Layout(STANDARD, (1, -1, 4)),
    "sequence": Layout(SEQUENCE, (1, -1, 4)),
}
