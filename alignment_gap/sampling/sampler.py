"""Ancestral sampling from a policy with a cache; the K responses to a prompt share the prompt's computation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree import leaves
from jaxtyping import Array, Bool, Float, Int, Key

from alignment_gap import checks, losses
from alignment_gap.errors import UserError
from alignment_gap.models import Policy, abstract_parameters, compute_params, merged
from alignment_gap.models.adapters import in_int8
from alignment_gap.models.layers import of_prompts, placed_cache
from alignment_gap.models.quantized import INT8
from alignment_gap.sharding import constrain, constrain_like, decoding, on_one_cpu

# Tokens in a block of `draw`: about the square root of a vocabulary's size.
_BLOCK = 128
# How often a CPU's loop over tokens may halve its prompts. Each halving is one more loop to compile, so there is none
# with fewer prompts than this, or with responses of at most this many tokens.
_HALVINGS = 2
_FEW = 16
_SHORT = 32
# The loops over the tokens of long responses: at most so many, each of at least so many tokens.
_MOST_LOOPS, _LEAST_TOKENS = 4, 32


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How responses are drawn.

    Attributes:
      temperature: divisor of the logits; 1 samples from the policy itself.
      top_k: draws only from the k most likely tokens; None allows all.
      top_p: draws only from the smallest set of most likely tokens whose total probability reaches this; None allows
        all.
      prompt_cache_dtype: "int8" holds the prompts' keys and values in int8, with a scale for each position and head.
        They take about half of the memory of bfloat16. Tokens are then drawn from slightly other distributions,
        which `sampler_log_probs` gives. None holds them in the dtype of the computation.
      weights_dtype: "int8" reads the projections of all layers in int8 for each token, with a scale for each output,
        half of the bytes of bfloat16. Prompts are computed with the weights as they are. Tokens are again drawn from
        slightly other distributions.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    prompt_cache_dtype: str | None = None
    weights_dtype: str | None = None

    @property
    def restricts(self) -> bool:
        """Whether samples come from another distribution than the policy: by a temperature, top_k or top_p."""
        return self.temperature != 1.0 or self.top_k is not None or (self.top_p or 1.0) < 1.0

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be above 0; for greedy decoding use top_k=1")
        checks.at_least(self, 1, "top_k")
        checks.above(self, 0, "top_p")
        checks.within(self, 0, 1, "top_p")
        checks.one_of(self, (None, INT8), "prompt_cache_dtype", "weights_dtype")


class Mixture(NamedTuple):
    """A reference to mix with the policy, token by token: pi^(1 - weight) ref^weight.

    Nash-MD and IPO-MD sample from this distribution; see `losses.geometric_mixture` (2312.00886, 2403.08635).

    Attributes:
      params: parameters of the reference, which has the policy's config.
      weight: from 0 (the policy) to 1 (the reference).
    """

    params: Any
    weight: float


class Samples(NamedTuple):
    """Drawn responses.

    Attributes:
      responses: token ids, 0 after the end.
      lengths: number of tokens, including the EOS; R if no EOS was drawn.
      log_probs: log-probs under the policy itself, in nats, as `models.score` gives them; 0 after the end. If
        prompts or weights are in int8, those of the policy that reads them.
      sampler_log_probs: log-probs under the distribution that the tokens were drawn from, after mixture, temperature,
        top-k and top-p.
    """

    responses: Int[Array, "B K R"]
    lengths: Int[Array, "B K"]
    log_probs: Float[Array, "B K R"]
    sampler_log_probs: Float[Array, "B K R"]


class _Decoding(NamedTuple):
    """The state of the loop over tokens."""

    position: Int[Array, ""]
    tokens: Int[Array, "B K"]
    ended: Bool[Array, "B K"]
    keys: Key[Array, "B K"]
    caches: list[Any]
    drawn: Samples


def sample_keys(run_key: Key[Array, ""], steps: Int[Array, "*B"], prompt_ids: Int[Array, "B"], samples: int) -> Any:
    """One random key for each prompt and sample [B, K]; the keys depend only on run, step and prompt id.

    So any batch can be drawn again. Neither the order of the prompts nor the mesh changes the samples. A prompt that a
    step repeats gets new samples each time. `steps` is the step of all prompts, or one for each.
    """
    steps = jnp.broadcast_to(steps, prompt_ids.shape)
    step_keys = jax.vmap(jax.random.fold_in, (None, 0))(run_key, steps)
    prompt_keys = jax.vmap(jax.random.fold_in)(step_keys, prompt_ids)
    earlier = jnp.tril((prompt_ids[:, None] == prompt_ids) & (steps[:, None] == steps), -1).sum(1)
    prompt_keys = jnp.where(earlier > 0, jax.vmap(jax.random.fold_in)(prompt_keys, earlier), prompt_keys)
    return jax.vmap(lambda key: jax.random.split(key, samples))(prompt_keys)


def sample(
    policy: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B"],
    keys: Key[Array, "B K"],
    *,
    max_length: int,
    eos_id: int | tuple[int, ...],
    config: SamplerConfig,
    mixture: Mixture | None = None,
) -> Samples:
    """Draws K responses of at most `max_length` tokens for each prompt, each ending with its EOS, or one of several.

    Token t is drawn with the response's key folded with t. Decoding stops when all rows have ended. With a mixture,
    each token comes from the mixture of both networks' distributions; each network has its own cache.
    """
    batch, samples = keys.shape
    # Adapters are merged once per call, because two more products in every projection would slow down each token. On a
    # base in int8 they are applied: their sum with the base would be a copy of it in a wider dtype.
    networks = [compute_params(policy, merged(each)) for each in (params, *([mixture.params] if mixture else []))]
    caches = [
        policy.prefill(each, prompts, prompt_lengths, samples, max_length, config.prompt_cache_dtype)
        for each in networks
    ]
    networks = [loop_weights(policy, each, config) for each in networks]
    start = jnp.broadcast_to(policy.start_tokens(prompts, prompt_lengths)[:, None], (batch, samples))
    with _decoding(policy, networks):
        boxed = abstract_parameters(policy.init)
        # In two steps, each a single collective: columns for rows within a copy, then the rows of the other copies. In
        # one step XLA would first gather each whole weight.
        networks = [constrain_like(boxed, constrain_like(boxed, each, embed="copied_embed")) for each in networks]
        caches = [placed_cache(cache) for cache in caches]
        start, keys = (constrain(x, "draws", None) for x in (start, keys))
        draw_from = functools.partial(_distribution, config=config, weight=mixture.weight if mixture else None)
        return _decode(policy, networks, caches, start, keys, draw_from, max_length=max_length, eos_id=eos_id)


def loop_weights(policy: Policy, params: Any, config: SamplerConfig) -> Any:
    """The parameters that the loop over tokens reads, from those of the computation."""
    return in_int8(policy, params) if config.weights_dtype == INT8 else params


def _decoding(policy: Policy, networks: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """The layout for a loop over tokens of these networks.

    Each token reads all weights but those of an encoder. An input embedding counts as a whole, although only rows of it
    are read.
    """
    weights = sum(
        leaf.nbytes for each in networks for name, part in each.items() if name != "encoder" for leaf in leaves(part)
    )
    (layers, *_), *_ = (leaf.shape for leaf in leaves(networks[0]["decoder"]["layers"]))
    kv_heads = getattr(policy.config, "kv_heads", policy.config.heads)
    return decoding(weights=weights, layers=layers * len(networks), kv_heads=kv_heads)


def _decode(
    policy: Policy,
    networks: Sequence[Any],
    caches: Sequence[Any],
    start: Int[Array, "B K"],
    keys: Key[Array, "B K"],
    draw_from: Callable[[list[Array]], Array],
    *,
    max_length: int,
    eos_id: int | tuple[int, ...],
) -> Samples:
    """The loop over tokens. It starts from caches that hold the prompts, and from each row's first input.

    `draw_from` maps the networks' logits to the logits that tokens are drawn from; the first network is the policy.
    """
    outputs = [policy.output(params) for params in networks]
    empty = jnp.zeros((*start.shape, max_length))

    def step(places: int, state: _Decoding) -> _Decoding:
        position, tokens, ended, keys, caches, drawn = state
        inputs = constrain(tokens, "rows", None)
        steps = [policy.decode_step(*each, position, inputs, places) for each in zip(networks, caches, strict=True)]
        logits = [_laid_out(output.logits(hidden)) for output, (hidden, _) in zip(outputs, steps, strict=True)]
        from_ = draw_from(logits)
        token_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, position)
        tokens = jax.vmap(jax.vmap(draw))(token_keys, from_).astype(tokens.dtype)
        tokens = jnp.where(ended, 0, tokens)
        drawn = Samples(
            drawn.responses.at[..., position].set(tokens),
            drawn.lengths + (~ended).astype(jnp.int32),
            drawn.log_probs.at[..., position].set(jnp.where(ended, 0.0, _chosen(logits[0], tokens))),
            drawn.sampler_log_probs.at[..., position].set(jnp.where(ended, 0.0, _chosen(from_, tokens))),
        )
        ended = ended | jnp.isin(tokens, jnp.array(eos_id))
        return _Decoding(position + 1, tokens, ended, keys, [cache for _, cache in steps], drawn)

    drawn = Samples(empty.astype(start.dtype), jnp.zeros(start.shape, jnp.int32), empty, empty)
    state = _Decoding(jnp.int32(0), start, jnp.zeros(start.shape, bool), keys, list(caches), drawn)
    halvings = _HALVINGS if max_length > _SHORT and on_one_cpu() else 0
    return _until_ended(state, step, _loop_ends(max_length), halvings)


def _loop_ends(max_length: int) -> list[int]:
    """The ends of the successive loops over the tokens of responses.

    A token reads the keys and values of all places of its response up to the end of its loop, the empty ones too. So
    several loops read less of long responses, but each is compiled.
    """
    loops = min(max_length // _LEAST_TOKENS, _MOST_LOOPS) or 1
    return [-(-max_length * (n + 1) // loops) for n in range(loops)]


def _until_ended(
    state: _Decoding, step: Callable[[int, _Decoding], _Decoding], ends: Sequence[int], halvings: int
) -> Samples:
    """Draws tokens until all rows have ended; whenever half of the prompts have, it goes on with the others.

    A CPU's time for a token grows with the rows. An accelerator often waits for the weights, however many rows there
    are, and would hold half of the caches beside the whole ones.
    """
    prompts = len(state.tokens)
    left = prompts // 2 if halvings and prompts >= _FEW and prompts % 2 == 0 else 0

    for begin, end in itertools.pairwise((0, *ends)):
        state = _draw_to(state, step, begin, end, left)
    if not left:
        return state.drawn
    # The unfinished prompts come first. If there are fewer than half, some that have ended fill up.
    kept = jnp.argsort(jnp.all(state.ended, axis=-1))[:left]
    caches = [of_prompts(cache, kept) for cache in state.caches]
    tokens, ended, keys, drawn = jax.tree.map(lambda x: x[kept], (state.tokens, state.ended, state.keys, state.drawn))
    others = _Decoding(state.position, tokens, ended, keys, caches, drawn)
    rest = _until_ended(others, step, ends, halvings - 1)
    return jax.tree.map(lambda whole, half: whole.at[kept].set(half), state.drawn, rest)


def _draw_to(
    state: _Decoding, step: Callable[[int, _Decoding], _Decoding], begin: int, end: int, left: int
) -> _Decoding:
    """Draws the tokens from `begin` to `end`, until at most `left` prompts are unfinished.

    The loop counts its own tokens, so that the number in its condition is how often it runs at most; plans read it.
    """

    def unfinished(counted: tuple[Int[Array, ""], _Decoding]) -> Bool[Array, ""]:
        count, state = counted
        return (count < end - begin) & (jnp.sum(~jnp.all(state.ended, axis=-1)) > left)

    def next_token(counted: tuple[Int[Array, ""], _Decoding]) -> tuple[Int[Array, ""], _Decoding]:
        count, state = counted
        return count + 1, step(end, state)

    _, state = jax.lax.while_loop(unfinished, next_token, (state.position - begin, state))
    return state


def _laid_out(logits: Float[Array, "B K V"]) -> Float[Array, "B K V"]:
    """Moves the logits so that each device draws for its own rows: in three steps, each a single collective."""
    for names in (("batch", None, "vocab"), ("draws", None, "vocab"), ("draws", None, None)):
        logits = constrain(logits, *names)
    return logits


def _distribution(
    logits: list[Float[Array, "B K V"]], *, config: SamplerConfig, weight: float | None
) -> Float[Array, "B K V"]:
    """The logits that tokens are drawn from: the policy's or the mixture's, restricted by the sampler's config."""
    mixed = logits[0] if weight is None else losses.geometric_mixture(*logits, mixture=weight)
    return restrict(mixed, config)


def draw(key: Key[Array, ""], logits: Float[Array, "V"]) -> Int[Array, ""]:
    """Draws a token from softmax(logits) by the inverse distribution function: first a block, then a token in it.

    This takes two random numbers. The Gumbel trick takes one for each token of the vocabulary, and those random bits
    cost more than a small model's step. Two numbers rather than one give a block of rare tokens all 24 bits of the
    second number.
    """
    block_key, token_key = jax.random.split(key)
    weights = jnp.exp(logits - jnp.max(logits))
    blocks = jnp.pad(weights, (0, -len(weights) % _BLOCK)).reshape(-1, _BLOCK)
    block = _invert(block_key, blocks.sum(-1))
    return block * _BLOCK + _invert(token_key, blocks[block])


def _invert(key: Key[Array, ""], weights: Float[Array, "N"]) -> Int[Array, ""]:
    """Draws an index in proportion to its weight; never an index of weight 0, however the sums are rounded."""
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights), 0.0)
    return jnp.argmax(cumulative > jax.random.uniform(key) * jnp.max(cumulative))


def restrict(logits: Float[Array, "*B V"], config: SamplerConfig) -> Float[Array, "*B V"]:
    """The logits after temperature, then top-k, then top-p; excluded tokens get minus infinity."""
    logits = logits / config.temperature
    if config.top_k is not None:
        kth = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if config.top_p is not None and config.top_p < 1.0:  # At 1, the rounding of the sum would exclude rare tokens.
        descending = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(descending, axis=-1)
        # A token stays if the tokens before it have a total probability below top_p, so at least one token stays.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < config.top_p
        threshold = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= threshold, logits, -jnp.inf)
    return logits


def _chosen(logits: Array, tokens: Array) -> Array:
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
