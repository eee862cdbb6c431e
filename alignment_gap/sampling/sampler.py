"""Ancestral sampling from a policy with a cache, K responses a prompt that share the prompt's computation."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from alignment_gap.errors import UserError
from alignment_gap.models import Policy, compute_params
from alignment_gap.sharding import constrain, constrain_like, decoding

# Tokens of a block in `draw`: about the square root of a vocabulary's size.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How responses are drawn.

    Attributes:
      temperature: divides the logits; 1 is the policy itself.
      top_k: only the k likeliest tokens; 0 means all.
      top_p: only the smallest set of likeliest tokens whose probability reaches this; 1 means all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError where a setting is out of its range."""
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}: it must be above 0; for greedy decoding use top_k=1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1 (all tokens)")


class Samples(NamedTuple):
    """Drawn responses.

    Attributes:
      responses: token ids, 0 after the end.
      lengths: tokens, EOS included; R where none was drawn.
      log_probs: under the policy itself, in nats; what a scorer gives for these tokens; 0 after the end.
      sampler_log_probs: under the distribution drawn from, after temperature, top-k and top-p.
    """

    responses: Int[Array, "B K R"]
    lengths: Int[Array, "B K"]
    log_probs: Float[Array, "B K R"]
    sampler_log_probs: Float[Array, "B K R"]


def sample_keys(run_key: Key[Array, ""], step: Int[Array, ""], prompt_ids: Int[Array, "B"], samples: int) -> Any:
    """One random key per prompt and sample [B, K], a function of run, step and prompt id only.

    So any batch can be drawn again, and neither the order of the prompts nor the mesh changes it.
    """
    step_key = jax.random.fold_in(run_key, step)
    prompt_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, prompt_ids)
    return jax.vmap(lambda key: jax.random.split(key, samples))(prompt_keys)


def sample(
    policy: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    keys: Key[Array, "B K"],
    *,
    max_length: int,
    eos_id: int,
    config: SamplerConfig,
) -> Samples:
    """Draws K responses of at most `max_length` tokens for each prompt, each ending with its EOS.

    A response's token t is drawn with its key folded with t; decoding stops when all rows have ended.
    """
    params = compute_params(policy, params)
    batch, samples = keys.shape
    cache = policy.prefill(params, prompts, prompt_lengths, samples, max_length)
    start = jnp.broadcast_to(policy.start_tokens(prompts, prompt_lengths)[:, None], (batch, samples))
    with decoding():
        params = constrain_like(jax.eval_shape(policy.init, jax.random.key(0)), params)
        start, keys = (constrain(x, "cache_batch", None) for x in (start, keys))
        return _decode(policy, params, cache, start, keys, max_length=max_length, eos_id=eos_id, config=config)


def _decode(
    policy: Policy,
    params: Any,
    cache: Any,
    start: Int[Array, "B K"],
    keys: Key[Array, "B K"],
    *,
    max_length: int,
    eos_id: int,
    config: SamplerConfig,
) -> Samples:
    """The loop over tokens, from a cache that holds the prompts and from each row's first input."""
    output = policy.output(params)
    empty = jnp.zeros((*start.shape, max_length))
    state = (
        jnp.int32(0),
        start,
        jnp.zeros(start.shape, bool),
        cache,
        Samples(empty.astype(start.dtype), jnp.zeros(start.shape, jnp.int32), empty, empty),
    )

    def step(state: Any) -> Any:
        position, tokens, ended, cache, drawn = state
        hidden, cache = policy.decode_step(params, cache, position, constrain(tokens, None, None))
        logits = output.logits(hidden)
        # In three moves, of which each is one collective, to devices that each draw for rows of their own.
        for names in (("batch", None, "vocab"), ("cache_batch", None, "vocab"), ("cache_batch", None, None)):
            logits = constrain(logits, *names)
        restricted = restrict(logits, config)
        token_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, position)
        tokens = jax.vmap(jax.vmap(draw))(token_keys, restricted).astype(tokens.dtype)
        tokens = jnp.where(ended, 0, tokens)
        drawn = Samples(
            drawn.responses.at[..., position].set(tokens),
            drawn.lengths + ~ended,
            drawn.log_probs.at[..., position].set(jnp.where(ended, 0.0, _chosen(logits, tokens))),
            drawn.sampler_log_probs.at[..., position].set(jnp.where(ended, 0.0, _chosen(restricted, tokens))),
        )
        return position + 1, tokens, ended | (tokens == eos_id), cache, drawn

    def unfinished(state: Any) -> Any:
        return (state[0] < max_length) & ~jnp.all(state[2])

    return jax.lax.while_loop(unfinished, step, state)[-1]


def draw(key: Key[Array, ""], logits: Float[Array, "V"]) -> Int[Array, ""]:
    """A token of softmax(logits), by inverting the distribution function: first a block of tokens, then one in it.

    Two random numbers instead of one for each token (Gumbel): random bits for a whole vocabulary cost more than a small
    model's step. Two, not one, so that a block of rare tokens has all 24 bits of the second to itself.
    """
    block_key, token_key = jax.random.split(key)
    weights = jnp.exp(logits - jnp.max(logits))
    blocks = jnp.pad(weights, (0, -len(weights) % _BLOCK)).reshape(-1, _BLOCK)
    block = _invert(block_key, blocks.sum(-1))
    return block * _BLOCK + _invert(token_key, blocks[block])


def _invert(key: Key[Array, ""], weights: Float[Array, "N"]) -> Int[Array, ""]:
    """An index drawn in proportion to its weight; never one of weight 0, whatever the rounding of the sums."""
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights), 0.0)
    return jnp.argmax(cumulative > jax.random.uniform(key) * jnp.max(cumulative))


def restrict(logits: Float[Array, "*B V"], config: SamplerConfig) -> Float[Array, "*B V"]:
    """Logits after temperature, with all tokens outside of top-k and then top-p at minus infinity."""
    logits = logits / config.temperature
    if config.top_k:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if config.top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token stays while the probability before it is below top_p, so that at least one always does.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < config.top_p
        threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return logits


def _chosen(logits: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
