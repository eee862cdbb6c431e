"""Attention by a fused kernel: cuDNN's on CUDA, Pallas splash on TPU; for all of the decoder but the loop over tokens.

Such kernels take one row of tokens and a mask. Here a row holds the prompt, right-aligned, and then its K responses,
one after another. All rows then have the same mask, a tree: each response branches off the end of the prompt.
Distances in this tree equal distances in the text, so masks with a window are static too. Two segments separate text
from padding.

A packed row holds all its prompts first, in their order, and then all responses. Segments separate the texts. There
the order of tokens is static but their distance is not, so packed rows support no window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jaxtyping import Array, Bool, Float, Int

from alignment_gap.errors import UserError
from alignment_gap.models.packing import Packing
from alignment_gap.sharding import spec_within

ATTENTIONS = ("auto", "xla", "cudnn", "splash")
# A row's length must be a multiple of this. Splash reads lanes of 128; cuDNN's masks are aligned to 8.
MULTIPLE = {"cudnn": 8, "splash": 128}
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
      prompt: slots for the prompt without its last token, which is the first input of every response; in packed rows,
        slots for all prompts.
      rows: number of responses.
      length: slots for each response.
      padding: padding slots at the end.
    """

    prompt: int
    rows: int
    length: int
    padding: int

    @classmethod
    def of(cls, prompt: int, rows: int, length: int, attention: str) -> Row:
        """The layout, padded to a length that the kernel supports."""
        return cls(prompt, rows, length, -(prompt + rows * length) % MULTIPLE[attention])

    def tokens(
        self, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B"], inputs: Int[Array, "B K R"]
    ) -> Int[Array, "B S"]:
        """The row's tokens; the slots before a short prompt hold arbitrary tokens."""
        shift = self.prompt + 1 - prompt_lengths
        slots = jnp.maximum(jnp.arange(self.prompt) - shift[:, None], 0)
        prompts = jnp.take_along_axis(prompts, slots, axis=1)
        row = jnp.concatenate([prompts, inputs.reshape(len(inputs), -1)], axis=1)
        return jnp.pad(row, ((0, 0), (0, self.padding)))

    def positions(self, prompt_lengths: Int[Array, "B"]) -> Int[Array, "B S"]:
        """The position of each slot in its text, at least 0."""
        return jnp.maximum(self._distances() - (self.prompt + 1 - prompt_lengths[:, None]), 0)

    def segments(self, prompt_lengths: Int[Array, "B"]) -> Int[Array, "B S"]:
        """0 at text and 1 at padding; tokens attend only within their segment."""
        slots = jnp.arange(len(self._branches()))
        before = slots < self.prompt + 1 - prompt_lengths[:, None]
        return ((before & (slots < self.prompt)) | (slots >= len(slots) - self.padding)).astype(jnp.int32)

    def packed(
        self, prompts: Int[Array, "B P"], inputs: Int[Array, "B K R"], packing: Packing
    ) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Int[Array, "B S"]]:
        """Tokens, positions and segments of a row of several prompts; each text is a segment.

        The last token of a prompt counts as padding, because it is the first input of the responses.
        """
        padding = packing.prompt_lengths.shape[-1]
        slots = jnp.where(packing.is_last(), padding, packing.prompts.slot)

        def line(prompts: Array, responses: Array, fill: int) -> Array:
            row = jnp.concatenate([prompts, responses.reshape(len(responses), -1)], axis=1)
            return jnp.pad(row, ((0, 0), (0, self.padding)), constant_values=fill)

        return (
            line(prompts, inputs, 0),
            line(packing.prompts.position, packing.response_positions(), 0),
            line(slots, packing.responses.slot, padding),
        )

    @property
    def size(self) -> int:
        """The number of slots."""
        return self.prompt + self.rows * self.length + self.padding

    def mask(
        self, window: int | None, queries: slice = slice(None), keys: slice = slice(None)
    ) -> Bool[np.ndarray, "Q S"]:
        """True where a slot attends to another: in the prompt or its own response, not later, and within the window."""
        branches, distances = self._branches(), self._distances()
        distance = distances[queries, None] - distances[keys]
        mask = (distance >= 0) & ((branches[keys] == 0) | (branches[queries, None] == branches[keys]))
        return mask if window is None else mask & (distance < window)

    def responses(self, x: Float[Array, "B S D"]) -> Float[Array, "B K R D"]:
        """The responses' part of the row."""
        end = x.shape[1] - self.padding
        return x[:, self.prompt : end].reshape(len(x), self.rows, self.length, -1)

    def _branches(self) -> Int[np.ndarray, " S"]:
        """0 in the prompt, k in response k, and K + 1 in the padding."""
        return np.repeat(np.arange(self.rows + 2), [self.prompt, *[self.length] * self.rows, self.padding])

    def _distances(self) -> Int[np.ndarray, " S"]:
        """Each slot's distance from the first slot, measured in the text: every response starts at the prompt's end."""
        responses = np.tile(self.prompt + np.arange(self.length), self.rows)
        return np.concatenate([np.arange(self.prompt), responses, np.arange(self.padding)])


Attend = Callable[[Array, Array, Array], Float[Array, "B S H C"]]


class _TreeMask(splash_attention_mask.Mask):
    """A row's mask, computed block by block: as one array, that of a long row would not fit in memory."""

    def __init__(self, row: Row, window: int | None):
        self.row, self.window = row, window

    @property
    def shape(self) -> tuple[int, ...]:
        return self.row.size, self.row.size

    def __getitem__(self, index: Any) -> Bool[np.ndarray, "Q S"]:
        return self.row.mask(self.window, *index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TreeMask) and (self.row, self.window) == (other.row, other.window)

    def __hash__(self) -> int:
        return hash((self.row, self.window))


def make(
    config: Any, attention: str, row: Row, segments: Int[Array, "B S"], *, scale: float
) -> Callable[[Any], Attend]:
    """A function that takes whether a layer is full, without a window, and returns its attention.

    The attention takes queries [B, S, H, C], and keys and values [B, S, G, C].

    Args:
      config: a `DecoderConfig`.
      attention: "cudnn" or "splash".
      row: the layout of the slots.
      segments: the segment of each slot.
      scale: factor on the logits.
    """
    kernel = _cudnn if attention == "cudnn" else functools.partial(_splash, config.attention_soft_cap)
    full = functools.partial(kernel, row, None, segments, scale)
    if config.window is None:
        return lambda _: full
    local = functools.partial(kernel, row, config.window, segments, scale)
    return lambda is_full: lambda *heads: jax.lax.cond(is_full, full, local, *heads)


def _cudnn(
    row: Row, window: int | None, segments: Array, scale: float, query: Array, keys: Array, values: Array
) -> Array:
    if CUDNN == "cudnn" and platform() not in ("cuda", "gpu"):
        raise UserError(f"DecoderConfig.attention is 'cudnn' on {platform()}: it needs a CUDA GPU; use xla")
    seen = (segments[:, :, None] == segments[:, None]) & row.mask(window)
    masked: Any = {"mask": seen[:, None], "implementation": CUDNN}
    return jax.nn.dot_product_attention(query, keys, values, scale=scale, **masked)


def _splash(
    soft_cap: float | None,
    row: Row,
    window: int | None,
    segments: Array,
    scale: float,
    query: Array,
    keys: Array,
    values: Array,
) -> Array:
    """The kernel on each device's own batch and heads."""
    attend = functools.partial(_splash_on_device, _TreeMask(row, window), soft_cap)
    arrays = (query * scale, keys, values, segments)
    names: list[tuple[str | None, ...]] = [("batch", None, name, None) for name in ("heads", "kv_heads", "kv_heads")]
    specs = [spec_within(x.shape, *axes) for x, axes in zip(arrays, [*names, ("batch", None)], strict=True)]
    if specs[0] is None:
        return attend(*arrays)
    if specs[1] != specs[0] and keys.shape[2] > 1:
        # The mesh cannot split the key heads as it splits the query heads; both then use the keys' sharding.
        specs[0] = specs[1]
    return jax.shard_map(attend, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*arrays)


def _splash_on_device(
    mask: _TreeMask, soft_cap: float | None, query: Array, keys: Array, values: Array, segments: Array
) -> Float[Array, "B S H C"]:
    if platform() not in ("tpu", "cpu"):
        raise UserError(f"DecoderConfig.attention is 'splash' on {platform()}: it needs a TPU; use xla or cudnn")
    size = next(size for size in (512, 256, 128) if mask.row.size % size == 0)
    blocks: Any = {f"block_{name}": size for name in ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")}
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * query.shape[2]),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() == "cpu",
    )

    def attend(query: Array, keys: Array, values: Array, segments: Array) -> Array:
        heads_first = (jnp.swapaxes(x, 0, 1) for x in (query, keys, values))
        return jnp.swapaxes(kernel(*heads_first, splash_attention_kernel.SegmentIds(segments, segments)), 0, 1)

    return jax.vmap(attend)(query, keys, values, segments)


def platform() -> str:
    """The platform of the mesh that the function is compiled for, maybe on another machine; else of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
