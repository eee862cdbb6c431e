"""Several prompts in one row, each with its responses: which text a token is of, where in it, and what it may see.

A row's prompts lie behind each other, and so do, in each of its K rows of responses, their responses. Lengths alone say
where: the texts of slot s begin where those of slot s - 1 end; a slot of length 0 is empty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Places(NamedTuple):
    """Of every token of a row its text and its place there.

    Attributes:
      slot: number of the text, and S at padding.
      position: tokens of the text before it.
    """

    slot: Int[Array, "*B T"]
    position: Int[Array, "*B T"]

    @classmethod
    def of(cls, lengths: Int[Array, "*B S"], size: int) -> Places:
        """The places in rows of `size` tokens that hold texts of these lengths."""
        ends, tokens = jnp.cumsum(lengths, axis=-1), jnp.arange(size)
        slot = jnp.sum(tokens[:, None] >= ends[..., None, :], axis=-1)
        return cls(slot, tokens - at(slot, ends - lengths))


class Packing(NamedTuple):
    """Where the tokens of packed rows are.

    Attributes:
      prompts: places of the prompts' tokens.
      responses: places of the responses' tokens.
      prompt_lengths: tokens of the prompts.
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
        """The value of each token's slot; any at padding."""
        return at(self.responses.slot, values[:, None])

    def is_last(self) -> Bool[Array, "B P"]:
        """True at the last token of each prompt; any at padding."""
        return self.prompts.position == at(self.prompts.slot, self.prompt_lengths) - 1

    def response_positions(self) -> Int[Array, "B K R"]:
        """Positions in the text of a prompt and its response, where a response's first input is the prompt's last."""
        return self.at_responses(self.prompt_lengths) - 1 + self.responses.position

    def within_prompts(self) -> Bool[Array, "B 1 P P"]:
        """True where two tokens are of one prompt."""
        return _same(self.prompts.slot, self.prompts.slot)[:, None]

    def within_responses(self) -> Bool[Array, "B K R R"]:
        """True where two tokens are of one response."""
        return _same(self.responses.slot, self.responses.slot)

    def across(self) -> Bool[Array, "B K R P"]:
        """True where a response's token meets one of its own prompt."""
        return _same(self.responses.slot, self.prompts.slot[:, None])


def at(slot: Int[Array, "*B T"], values: Int[Array, "*#B S"]) -> Int[Array, "*B T"]:
    """The values of slots; the last one's at padding."""
    return jnp.take_along_axis(values, jnp.minimum(slot, values.shape[-1] - 1), axis=-1)


def unpack(
    values: Float[Array, "B K R"], lengths: Int[Array, "B S K"], empty: float
) -> tuple[Float[Array, "B*S K R"], Int[Array, "B*S K"]]:
    """Values of packed responses as one row for each response, from its first token on, 0 behind its end; and lengths.

    What an empty slot has must not be infinite under any loss: it gets responses of one token of the value `empty`.
    """
    ends = jnp.cumsum(lengths, axis=1)
    places = (ends - lengths)[..., None] + jnp.arange(values.shape[-1])
    rows = jnp.take_along_axis(values[:, None], jnp.minimum(places, values.shape[-1] - 1), axis=-1)
    rows = jnp.where(jnp.arange(values.shape[-1]) < lengths[..., None], rows, 0.0)
    rows = rows.at[..., 0].set(jnp.where(lengths > 0, rows[..., 0], empty))
    return rows.reshape(-1, *values.shape[1:]), jnp.maximum(lengths, 1).reshape(-1, values.shape[1])


def _same(queries: Int[Array, "*B Q"], keys: Int[Array, "*#B S"]) -> Bool[Array, "*B Q S"]:
    return queries[..., None] == keys[..., None, :]
