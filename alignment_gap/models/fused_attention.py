"""Attention by a fused kernel: cuDNN's on CUDA, Pallas splash on TPU; for all of the decoder but the loop over tokens.

Such kernels take one row of tokens and a mask. Here a row holds the prompt, right-aligned, and then its K responses,
one after another. All rows then have the same mask, a tree: each response branches off the end of the prompt.
Distances in this tree equal distances in the text, so masks with a window are static too. Two segments separate text
from padding. A sampler's row holds a prompt alone, left-aligned; no token attends to one after it.

A packed row holds all its prompts first, in their order, and then all responses. Segments separate the texts. There
the order of tokens is static but their distance is not, so packed rows support no window.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from alignment_gap.errors import UserError
from alignment_gap.models.packing import Packing
from alignment_gap.sharding import spec_within

ATTENTIONS = ("auto", "xla", "cudnn", "splash")
# The kernels read rows of a multiple of these slots: cuDNN's masks are aligned to 8, splash reads lanes of 128.
CUDNN_MULTIPLE, LANES = 8, 128
# A row of a prompt and its responses has a multiple of these slots. So many fill XLA's tiles of bfloat16, and mesh axes
# of 2, 4, 8 and 16 devices split them.
TILE = 16
# The blocks of splash that a row of more slots is cut into.
BLOCKS = (256, 384, 512, 640)
# The implementation that jax.nn.dot_product_attention runs for "cudnn"; tests set its XLA form, to run on a CPU.
CUDNN: Any = "cudnn"


def check(config: Any) -> None:
    """Raises UserError if the attention kernel does not support a decoder's settings."""
    name = "DecoderConfig.attention"
    if config.attention != "cudnn":
        return
    if config.attention_soft_cap is not None:
        raise UserError(f"{name} is 'cudnn', which has no attention_soft_cap: use xla, or splash on TPU")
    if config.head_size % 8 or config.head_size > 256:
        raise UserError(f"{name} is 'cudnn' with head_size={config.head_size}: it takes multiples of 8 up to 256")
    if config.dtype != "bfloat16":
        raise UserError(f"{name} is 'cudnn' with dtype={config.dtype}: it computes in bfloat16")


def choose(config: Any, *, packed: bool = False) -> str:
    """The implementation of a decoder's attention: splash on TPUs and "xla" elsewhere, unless the config names one.

    Raises:
      UserError: the config names a kernel that has no windows in packed rows, and needs them.
    """
    has_windows = packed and config.window is not None
    if config.attention == "auto":
        return "splash" if platform() == "tpu" and not has_windows else "xla"
    if config.attention != "xla" and has_windows:
        raise UserError(
            f"DecoderConfig.window is {config.window} with attention={config.attention!r}, which has no windows in "
            "packed rows: use attention=xla, or buckets instead of packing"
        )
    return config.attention


class Row(NamedTuple):
    """The layout of a row's slots.

    Attributes:
      prompt: slots for the prompt; without its last token if there are responses, whose first input it is; in packed
        rows, slots for all prompts.
      rows: number of responses.
      length: slots for each response.
    """

    prompt: int
    rows: int = 0
    length: int = 0

    @property
    def size(self) -> int:
        """The number of slots."""
        return self.prompt + self.rows * self.length

    def tokens(
        self, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B"], inputs: Int[Array, "B K R"]
    ) -> Int[Array, "B S"]:
        """The row's tokens; the slots before a short prompt hold arbitrary tokens."""
        shift = self.prompt + 1 - prompt_lengths
        slots = jnp.maximum(jnp.arange(self.prompt) - shift[:, None], 0)
        return _joined(jnp.take_along_axis(prompts, slots, axis=1), inputs)

    def positions(self, prompt_lengths: Int[Array, "B"]) -> Int[Array, "B S"]:
        """The position of each slot in its text, at least 0."""
        return jnp.maximum(_distances(self, self.size) - (self.prompt + 1 - prompt_lengths[:, None]), 0)

    def segments(self, prompt_lengths: Int[Array, "B"]) -> Int[Array, "B S"]:
        """0 at text and 1 before it; tokens attend only within their segment."""
        slots = jnp.arange(self.size)
        return ((slots < self.prompt + 1 - prompt_lengths[:, None]) & (slots < self.prompt)).astype(jnp.int32)

    def packed(
        self, prompts: Int[Array, "B P"], inputs: Int[Array, "B K R"], packing: Packing
    ) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Int[Array, "B S"]]:
        """Tokens, positions and segments of a row of several prompts; each text is a segment.

        The last token of a prompt counts as padding, because it is the first input of the responses.
        """
        slots = jnp.where(packing.is_last(), packing.prompt_lengths.shape[-1], packing.prompts.slot)
        return (
            _joined(prompts, inputs),
            _joined(packing.prompts.position, packing.response_positions()),
            _joined(slots, packing.responses.slot),
        )

    def mask(
        self, window: int | None, size: int, queries: slice = slice(None), keys: slice = slice(None)
    ) -> Bool[np.ndarray, "Q S"]:
        """True where a slot attends to another: in the prompt or its own response, not later, and within the window.

        Slots after the end, up to `size`, attend to each other alone.
        """
        branches, distances = _branches(self, size), _distances(self, size)
        distance = distances[queries, None] - distances[keys]
        mask = (distance >= 0) & ((branches[keys] == 0) | (branches[queries, None] == branches[keys]))
        return mask if window is None else mask & (distance < window)

    def responses(self, x: Float[Array, "B S D"]) -> Float[Array, "B K R D"]:
        """The responses' part of the row."""
        return x[:, self.prompt : self.size].reshape(len(x), self.rows, self.length, -1)


def _joined(prompts: Int[Array, "B P"], responses: Int[Array, "B K R"]) -> Int[Array, "B S"]:
    return jnp.concatenate([prompts, responses.reshape(len(responses), -1)], axis=1)


@functools.cache
def _branches(row: Row, size: int) -> Int[np.ndarray, " S"]:
    """0 in the prompt, k in response k, and K + 1 after the end."""
    return np.repeat(np.arange(row.rows + 2), [row.prompt, *[row.length] * row.rows, size - row.size])


@functools.cache
def _distances(row: Row, size: int) -> Int[np.ndarray, " S"]:
    """Each slot's distance from the first slot, measured in the text: every response starts at the prompt's end.

    Slots after the end come before all others.
    """
    responses = np.tile(row.prompt + np.arange(row.length), row.rows)
    return np.concatenate([np.arange(row.prompt), responses, np.arange(row.size - size, 0)])


Attend = Callable[[Array, Array, Array], Float[Array, "B S H C"]]


class _TreeMask(splash_attention_mask.Mask):
    """A row's mask, computed block by block: as one array, that of a long row would not fit in memory."""

    def __init__(self, row: Row, window: int | None, size: int):
        self.facts = row, window, size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.facts[2], self.facts[2]

    def __getitem__(self, index: Any) -> Bool[np.ndarray, "Q S"]:
        row, window, size = self.facts
        return row.mask(window, size, *index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TreeMask) and self.facts == other.facts

    def __hash__(self) -> int:
        return hash(self.facts)


def make(
    config: Any, attention: str, row: Row, segments: Int[Array, "B S"] | None, *, scale: float
) -> Callable[[Any], Attend]:
    """A function that takes whether a layer is full, without a window, and returns its attention.

    The attention takes queries [B, S, H, C], and keys and values [B, S, G, C].

    Args:
      config: a `DecoderConfig`.
      attention: "cudnn" or "splash".
      row: the layout of the slots.
      segments: the segment of each slot; None if all have the same.
      scale: factor on the logits.
    """
    kernel = _cudnn if attention == "cudnn" else functools.partial(_splash, config.attention_soft_cap)
    full = functools.partial(kernel, row, None, segments, scale)
    if config.window is None:
        return lambda _: full
    local = functools.partial(kernel, row, config.window, segments, scale)
    return lambda is_full: lambda *heads: jax.lax.cond(is_full, full, local, *heads)


def _cudnn(
    row: Row, window: int | None, segments: Array | None, scale: float, query: Array, keys: Array, values: Array
) -> Array:
    if CUDNN == "cudnn" and platform() not in ("cuda", "gpu"):
        raise UserError(f"DecoderConfig.attention is 'cudnn' on {platform()}: it needs a CUDA GPU; use auto or xla")
    size = query.shape[1] + -query.shape[1] % CUDNN_MULTIPLE
    seen: Any = row.mask(window, size)[None]
    if segments is not None:
        segments = _padded(segments, size)
        seen = (segments[:, :, None] == segments[:, None]) & seen
    masked: Any = {"mask": seen[:, None], "implementation": CUDNN}
    arrays = (_padded(x, size) for x in (query, keys, values))
    return jax.nn.dot_product_attention(*arrays, scale=scale, **masked)[:, : query.shape[1]]


def whole_tiles(x: Int[Array, "B S"]) -> Int[Array, "B Z"]:
    """The row with zeros after its end, up to a multiple of 16 slots."""
    return _padded(x, x.shape[1] + -x.shape[1] % TILE)


def _padded(x: Array, size: int) -> Array:
    """The array with zeros after the slots of its second axis, up to `size`."""
    return jnp.pad(x, [(0, size - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)])


def _splash(
    soft_cap: float | None,
    row: Row,
    window: int | None,
    segments: Array | None,
    scale: float,
    query: Array,
    keys: Array,
    values: Array,
) -> Array:
    """The kernel on each device's own batch and heads."""
    if platform() not in ("tpu", "cpu"):
        raise UserError(f"DecoderConfig.attention is 'splash' on {platform()}: it needs a TPU; use auto or xla")
    attend = functools.partial(_splash_on_device, row, window, soft_cap)
    rest = [] if segments is None else [segments]
    spec = spec_within(query.shape, "batch", None, "heads", None)
    if spec is None:
        return attend(query * scale, keys, values, *rest)
    groups, heads = keys.shape[2], query.shape[2]
    if groups > 1:
        # If the mesh splits the query heads into more parts than there are key heads, each part gets a copy of its own.
        sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
        copies = math.lcm(groups, heads // sharding.shard_shape(query.shape)[2]) // groups
        keys, values = (jnp.repeat(x, copies, axis=2) for x in (keys, values))
    of_keys = spec if groups > 1 else PartitionSpec(spec[0], None, None, None)
    specs = (spec, of_keys, of_keys, *(PartitionSpec(spec[0], None) for _ in rest))
    split = jax.shard_map(attend, in_specs=specs, out_specs=spec, check_vma=False)
    return split(query * scale, keys, values, *rest)


def block_of(size: int) -> int:
    """The slots of a block of splash."""
    return least_padding(size, BLOCKS) if size > LANES else LANES


def least_padding(size: int, blocks: Sequence[int]) -> int:
    """Of the blocks that need the least padding for this size, the largest."""
    return min(blocks, key=lambda block: (-size % block, -block))


def _splash_on_device(
    row: Row, window: int | None, soft_cap: float | None, query: Array, keys: Array, values: Array, *segments: Array
) -> Float[Array, "B S H C"]:
    block = block_of(query.shape[1])
    size = query.shape[1] + -query.shape[1] % block
    blocks: Any = {f"block_{name}": block for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([_TreeMask(row, window, size)] * query.shape[2]),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() == "cpu",
    )

    def attend(query: Array, keys: Array, values: Array, *segments: Array) -> Array:
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (query, keys, values))
        ids = [splash_attention_kernel.SegmentIds(each, each) for each in segments]
        return jnp.swapaxes(kernel(*heads_first, *ids), 0, 1)

    arrays = (_padded(x, size) for x in (query, keys, values, *segments))
    return jax.vmap(attend)(*arrays)[:, : query.shape[1]]


def platform() -> str:
    """The platform of the mesh that the function is compiled for, maybe on another machine; else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
