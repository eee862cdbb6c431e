"""A reward model with a head of its own: one number for a text, as transformers' sequence classification computes it.

The parameters are the policy's and those of the head. A decoder's head is a linear map of the hidden state at the last
token of prompt and response. T5 reads both in its encoder and again in its decoder; its head has a hidden layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alignment_gap.models.policy import HEAD, OUTPUT, Policy, response_hidden
from alignment_gap.models.ragged import column, join
from alignment_gap.models.t5 import T5Policy


@dataclasses.dataclass(frozen=True)
class RewardHead:
    """How a reward model with a head of its own reads a text: the prompt, `before`, the response, `after`.

    Attributes:
      pad_id: a decoder's head reads the last token that is not this one, as transformers does; None for the last token.
        It matters where padding and the end of a response share an id. The prompt's last token is read at the earliest.
      before: the token before the response; None for none.
      after: the token after the response; None for none.
      bias: whether a decoder's head adds a bias to its linear map, as OpenAssistant's does. T5's head always does.
    """

    pad_id: int | None = None
    before: int | None = None
    after: int | None = None
    bias: bool = False


def without_output(config: Any) -> Any:
    """The config of the policy inside a reward model: it needs no output embedding and no cap on logits."""
    changes = {"logits_soft_cap": None} if hasattr(config, "logits_soft_cap") else {}
    return dataclasses.replace(config, tied_embeddings=True, **changes)


def without_head(params: Any) -> Any:
    """The parameters of a policy or reward model without the head, and without an output embedding of its own."""
    return {name: each for name, each in params.items() if name not in (HEAD, OUTPUT)}


def replace_output(params: Any, head: Any) -> Any:
    """A policy's parameters with those of a head in place of its output embedding, if it has one."""
    return without_head(params) | {HEAD: head}


@functools.cache
def make_init(policy: Policy, head: RewardHead) -> Callable[[Array], Any]:
    """The function that makes fresh parameters of the policy and the head, in boxes, from a key."""

    def init(key: Array) -> Any:
        of_policy, of_head = jax.random.split(key)
        return {**policy.init(of_policy), HEAD: init_head(policy, head, of_head)}

    return init


def rewards(
    policy: Policy,
    head: RewardHead,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    responses: Int[Array, "B K R"],
    response_lengths: Int[Array, "B K"],
) -> Float[Array, "B K"]:
    """The reward of each response; float32."""
    rows = [_marked(head, responses[:, k], response_lengths[:, k]) for k in range(responses.shape[1])]
    if isinstance(policy, T5Policy):
        texts = [join([(prompts, prompt_lengths), row]) for row in rows]
        return _t5_rewards(policy, params, *(jnp.stack(part, axis=1) for part in zip(*texts, strict=True)))
    text, lengths = (jnp.stack(part, axis=1) for part in zip(*rows, strict=True))
    # Input t is the token before the text's token t. So one more slot is needed, whose input is the last token.
    slots = jnp.pad(text, ((0, 0), (0, 0), (0, 1)))
    hidden = response_hidden(policy, params, prompts, prompt_lengths, slots)
    last = _at(hidden, _last(head, text, lengths))
    reward = jnp.sum(last * params[HEAD]["kernel"][:, 0], axis=-1)
    return reward + params[HEAD]["bias"][0] if head.bias else reward


def init_head(policy: Policy, head: RewardHead, key: Array) -> Any:
    """Fresh parameters of a head, in boxes."""
    width = policy.config.width

    def kernel(key: Array, outputs: int) -> Any:
        value = width**-0.5 * jax.random.normal(key, (width, outputs), jnp.float32)
        return nn.LogicallyPartitioned(value, ("embed", None))

    def bias(outputs: int) -> Any:
        return nn.LogicallyPartitioned(jnp.zeros((outputs,), jnp.float32), (None,))

    if not isinstance(policy, T5Policy):
        return {"kernel": kernel(key, 1)} | ({"bias": bias(1)} if head.bias else {})
    first, second = jax.random.split(key)
    return {
        "dense": {"kernel": kernel(first, width), "bias": bias(width)},
        "output": {"kernel": kernel(second, 1), "bias": bias(1)},
    }


def _marked(head: RewardHead, response: Array, lengths: Array) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """A response between the tokens `before` and `after`, if the head has these tokens."""
    before, after = (
        [] if token is None else [column(token, len(response), response.dtype)] for token in (head.before, head.after)
    )
    parts = [*before, (response, lengths), *after]
    return parts[0] if len(parts) == 1 else join(parts)


def _last(head: RewardHead, text: Int[Array, "B K T"], lengths: Int[Array, "B K"]) -> Int[Array, "B K"]:
    """The number of the token that a decoder's head reads, counted from 1; 0 for the prompt's last token."""
    if head.pad_id is None:
        return lengths
    count = jnp.arange(1, text.shape[-1] + 1)
    is_read = (count <= lengths[..., None]) & (text != head.pad_id)
    return jnp.max(jnp.where(is_read, count, 0), axis=-1)


def _t5_rewards(
    policy: T5Policy, params: Any, texts: Int[Array, "B K S"], lengths: Int[Array, "B K"]
) -> Float[Array, "B K"]:
    """The rewards of whole texts; the head reads the decoder's state that predicts the last token, the end id."""
    size, head = texts.shape[-1], params[HEAD]
    rows = (texts.reshape(-1, size), lengths.reshape(-1))
    hidden = response_hidden(policy, params, *rows, rows[0][:, None])
    last = _at(hidden.reshape(*texts.shape, -1), lengths - 1)
    middle = jnp.tanh(jnp.matmul(last, head["dense"]["kernel"], precision="highest") + head["dense"]["bias"])
    return jnp.sum(middle * head["output"]["kernel"][:, 0], axis=-1) + head["output"]["bias"][0]


def _at(hidden: Float[Array, "B K T D"], place: Int[Array, "B K"]) -> Float[Array, "B K D"]:
    return jnp.take_along_axis(hidden, place[..., None, None], axis=2)[:, :, 0].astype(jnp.float32)
