"""Packed rows, which hold several prompts and their responses: each token's text, its position, and what it may see.

A row holds its prompts one after another. Each of its K rows of responses holds the responses in the same order. The
lengths give the place of every text: slot s begins where slot s - 1 ends. A slot of length 0 is empty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Places(NamedTuple):
    """For every token of a row: its text, and its position in this text.

    Attributes:
      slot: number of the text; S at padding.
      position: number of earlier tokens in the text.
    """

    slot: Int[Array, "*B T"]
    position: Int[Array, "*B T"]

    @classmethod
    def of(cls, lengths: Int[Array, "*B S"], size: int) -> Places:
        """The places in rows of `size` tokens that hold texts of these lengths."""
        ends, tokens = jnp.cumsum(lengths, axis=-1), jnp.arange(size)
        slot = jnp.sum(tokens[:, None] >= ends[..., None, :], axis=-1)
        return cls(slot, tokens - at(slot, ends - lengths))


class Ranges(NamedTuple):
    """The keys that each query attends to: those from `begin` until before `end`; none if the two are equal."""

    begin: Int[Array, "B K Q"]
    end: Int[Array, "B K Q"]

    @classmethod
    def prefix(cls, lengths: Int[Array, "B"], shape: tuple[int, ...]) -> Ranges:
        """Every query attends to its whole prompt."""
        end = jnp.broadcast_to(lengths[:, None, None], shape)
        return cls(jnp.zeros_like(end), end)

    @classmethod
    def causal(cls, shape: tuple[int, ...]) -> Ranges:
        """Every query attends to its own row, up to itself."""
        end = jnp.broadcast_to(jnp.arange(1, shape[-1] + 1), shape)
        return cls(jnp.zeros_like(end), end)

    def only(self, mask: Bool[Array, "B K Q"]) -> Ranges:
        """The ranges with no keys where the mask is false."""
        return Ranges(*(jnp.where(mask, x, 0) for x in self))


class Packing(NamedTuple):
    """The places of all tokens in packed rows.

    Attributes:
      prompts: places of the prompts' tokens.
      responses: places of the responses' tokens.
      prompt_lengths: number of tokens of each prompt.
    """

    prompts: Places
    responses: Places
    prompt_lengths: Int[Array, "B S"]

    @classmethod
    def of(
        cls,
        prompt_lengths: Int[Array, "B S"],
        response_lengths: Int[Array, "B S K"],
        prompt_size: int,
        response_size: int,
    ) -> Packing:
        """The places of rows [B, P] of prompts and [B, K, R] of responses."""
        prompts = Places.of(prompt_lengths, prompt_size)
        return cls(prompts, Places.of(jnp.swapaxes(response_lengths, 1, 2), response_size), prompt_lengths)

    @property
    def is_response(self) -> Bool[Array, "B K R"]:
        """True at the responses' tokens, False at padding."""
        return self.responses.slot < self.prompt_lengths.shape[-1]

    def at_responses(self, values: Int[Array, "B S"]) -> Int[Array, "B K R"]:
        """Each token's value by its slot; arbitrary at padding."""
        return at(self.responses.slot, values[:, None])

    def is_last(self) -> Bool[Array, "B P"]:
        """True at the last token of each prompt; arbitrary at padding."""
        return self.prompts.position == at(self.prompts.slot, self.prompt_lengths) - 1

    def response_positions(self) -> Int[Array, "B K R"]:
        """Positions in the text of prompt and response; a response's first input is the last token of its prompt."""
        return self.at_responses(self.prompt_lengths) - 1 + self.responses.position

    def within_prompts(self) -> Bool[Array, "B 1 P P"]:
        """True where two tokens belong to the same prompt."""
        return _same(self.prompts.slot, self.prompts.slot)[:, None]

    def within_responses(self) -> Bool[Array, "B K R R"]:
        """True where two tokens belong to the same response."""
        return _same(self.responses.slot, self.responses.slot)

    def across(self) -> Bool[Array, "B K R P"]:
        """True where a response's token and a prompt's token belong together."""
        return _same(self.responses.slot, self.prompts.slot[:, None])

    def prompt_ranges(self) -> Ranges:
        """`within_prompts` as ranges, without the padding."""
        begin = jnp.arange(self.prompts.slot.shape[-1]) - self.prompts.position
        ranges = Ranges(begin[:, None], (begin + at(self.prompts.slot, self.prompt_lengths))[:, None])
        return ranges.only((self.prompts.slot < self.prompt_lengths.shape[-1])[:, None])

    def causal_ranges(self) -> Ranges:
        """`within_responses` as ranges up to each token itself, without the padding."""
        end = Ranges.causal(self.responses.slot.shape).end
        return Ranges(end - 1 - self.responses.position, end).only(self.is_response)

    def across_ranges(self) -> Ranges:
        """`across` as ranges, without the padding."""
        ends = jnp.cumsum(self.prompt_lengths, axis=1)
        begins = ends - self.prompt_lengths
        return Ranges(self.at_responses(begins), self.at_responses(ends)).only(self.is_response)


def at(slot: Int[Array, "*B T"], values: Int[Array, "*#B S"]) -> Int[Array, "*B T"]:
    """Each token's value by its slot; padding gets the last slot's value."""
    return jnp.take_along_axis(values, jnp.minimum(slot, values.shape[-1] - 1), axis=-1)


def unpack(
    values: Float[Array, "B K R"], lengths: Int[Array, "B S K"], empty: float
) -> tuple[Float[Array, "B*S K R"], Int[Array, "B*S K"]]:
    """Unpacks values to one row for each response, left-aligned and 0 after the response's end; also the lengths.

    No loss may be infinite on an empty slot, so an empty slot gets responses of one token with the value `empty`.
    """
    ends = jnp.cumsum(lengths, axis=1)
    places = (ends - lengths)[..., None] + jnp.arange(values.shape[-1])
    rows = jnp.take_along_axis(values[:, None], jnp.minimum(places, values.shape[-1] - 1), axis=-1)
    rows = jnp.where(jnp.arange(values.shape[-1]) < lengths[..., None], rows, 0.0)
    rows = rows.at[..., 0].set(jnp.where(lengths > 0, rows[..., 0], empty))
    return rows.reshape(-1, *values.shape[1:]), jnp.maximum(lengths, 1).reshape(-1, values.shape[1])


def _same(queries: Int[Array, "*B Q"], keys: Int[Array, "*#B S"]) -> Bool[Array, "*B Q S"]:
    return queries[..., None] == keys[..., None, :]
