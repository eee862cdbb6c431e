"""Logical axis names, as in T5X, and the mesh axes that they are laid over: one table for each layout."""

from __future__ import annotations

from typing import NamedTuple

AXES = ("data", "fsdp", "model")

# (name of an axis of an array, the mesh axis or axes that split it, or None for whole). As in T5X the rules are read in
# order and a mesh axis splits one axis of an array: activations are split by batch, so their width stays whole where
# that of a parameter is split. A name may have several rules, of which the first that fits counts.
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
    # The half of an adapter that has no width.
    ("rank", "fsdp"),
    ("kv", None),
    ("length", None),
    ("kv_length", None),
    ("layers", None),
    ("relpos_buckets", None),
)
# Between attention and MLP, where no heads and no MLP are split, the positions are in their place (2205.05198).
SEQUENCE: Rules = (*(rule for rule in STANDARD if rule[0] != "length"), ("length", "model"))

# For a loop over tokens, whatever the layout, on a mesh whose fsdp axis is split in two, fsdp and columns. Gathering
# weights for every token would take most of its time, so these stay, split along both of their axes, and activations,
# small for one token, move: a product's input is split as the weights' rows are, and what it gives is added up over
# them. The cache stays where the prompts were computed, on all devices of a copy of the model.
DECODING: Rules = (
    ("embed", "fsdp"),
    ("cache_batch", ("data", "fsdp", "columns")),
    *((name, axes) for name in ("vocab", "mlp", "heads", "kv_heads") for axes in (("columns", "model"), "model")),
    ("batch", ("data", "fsdp")),
    ("batch", "data"),
)


class Layout(NamedTuple):
    """A table of rules, and the sizes of the mesh axes (data, fsdp, model) that a config does not give.

    A size of -1 takes all devices that are left.
    """

    rules: Rules
    sizes: tuple[int, int, int]


# The hosts of most TPUs have four chips: a model axis of four stays within one.
LAYOUTS: dict[str, Layout] = {
    "data": Layout(STANDARD, (-1, 1, 1)),
    "fsdp": Layout(STANDARD, (1, -1, 1)),
    "tensor": Layout(STANDARD, (1, 1, -1)),
    "fsdp_tensor": Layout(STANDARD, (1, -1, 4)),
    "sequence": Layout(SEQUENCE, (1, -1, 4)),
}
