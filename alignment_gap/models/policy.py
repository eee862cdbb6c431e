"""The interface that every policy offers to losses, sampling and evaluation, whatever its architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignment_gap import losses
from alignment_gap.errors import UserError
from alignment_gap.models.packing import Packing
from alignment_gap.models.stack import REMAT_POLICIES
from alignment_gap.sharding import constrain, parts_within

# The name of a reward model's head among its parameters; see `models.reward_head`.
HEAD = "score"
# The name of the output embedding among the parameters, where it is not the input embedding.
OUTPUT = "output_embedder"


class Output(NamedTuple):
    """How hidden states become logits: z = scale * hidden @ embedding.T, then soft_cap * tanh(z / soft_cap).

    Attributes:
      embedding: output embedding, of all tokens or of a few.
      scale: factor on the logits.
      soft_cap: bound on the absolute logits, or None.
    """

    embedding: Float[Array, "V D"]
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """The logits of all tokens at once, accumulated in float32; training uses `losses.token_log_probs` instead."""
        embedding = self.embedding.astype(hidden.dtype)
        logits = self.scale * jnp.einsum("...d,vd->...v", hidden, embedding, preferred_element_type=jnp.float32)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


@runtime_checkable
class Policy(Protocol):
    """A language model that scores and continues prompts. It is a frozen value; callers pass the parameters.

    Input t is the token before the response's token t, and predicts this token. Input 0 is `start_tokens`.
    """

    def __hash__(self) -> int:
        """Equal policies have equal hashes, so that they share compiled functions."""

    @property
    def config(self) -> Any:
        """Sizes and settings: a frozen dataclass."""

    def init(self, key: Array) -> Any:
        """Fresh parameters, each in a box with its logical axis names."""

    def output(self, params: Any) -> Output:
        """The output embedding, and the scale and soft cap of its logits."""

    def start_tokens(self, prompts: Int[Array, "B P"], prompt_lengths: Int[Array, "B *S"]) -> Int[Array, "B *S"]:
        """For each prompt, the input that predicts the first token of its responses; a row may hold S prompts."""

    def hidden(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B *S"],
        inputs: Int[Array, "B K R"],
        packing: Packing | None = None,
    ) -> Float[Array, "B K R D"]:
        """Hidden states that predict the tokens of K responses; the prompt is computed once.

        For rows of several prompts, `packing` gives the places of the texts, and `prompt_lengths` is ignored.
        """

    def prefill(
        self,
        params: Any,
        prompts: Int[Array, "B P"],
        prompt_lengths: Int[Array, "B"],
        samples: int,
        max_length: int,
        cache_dtype: str | None = None,
    ) -> Any:
        """A cache to decode `samples` responses of at most `max_length` tokens for each prompt.

        It is a dictionary. "prompt" and "responses" are keys and values of all layers, as in `layers.placed_cache`; all
        else has one entry for each prompt. `cache_dtype` is "int8" for the prompts' keys and values in int8, and None
        for the dtype of the computation.
        """

    def decode_step(
        self, params: Any, cache: Any, step: Int[Array, ""], tokens: Int[Array, "B K"], places: int
    ) -> tuple[Float[Array, "B K D"], Any]:
        """Hidden states that predict the token at `step` from `tokens`, and the cache extended by `tokens`.

        `step` is below `places`: only so many places of the responses are read.
        """


def response_hidden(
    policy: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B *S"],
    responses: Int[Array, "B K R"],
    packing: Packing | None = None,
) -> Float[Array, "B K R D"]:
    """Hidden states that predict each token of the given responses."""
    start = policy.start_tokens(prompts, prompt_lengths)
    if packing is None:
        first = jnp.broadcast_to(start[:, None, None], (*responses.shape[:2], 1))
        inputs = jnp.concatenate([first, responses[..., :-1]], axis=-1)
    else:
        before = jnp.pad(responses[..., :-1], ((0, 0), (0, 0), (1, 0)))
        inputs = jnp.where(packing.responses.position == 0, packing.at_responses(start), before)
    hidden = policy.hidden(params, prompts, prompt_lengths, inputs, packing)
    return constrain(hidden, "batch", None, None, "embed")


def score(
    policy: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B *S"],
    responses: Int[Array, "B K R"],
    response_lengths: Int[Array, "B *S K"],
) -> Float[Array, "B K R"]:
    """Log-probs in nats of every response token, given the prompt and the earlier tokens; float32, 0 at padding.

    If the lengths have an axis of S prompts, the rows are packed as in `models.packing`; no text attends to another.
    """
    hidden, mask = _predicting(policy, params, prompts, prompt_lengths, responses, response_lengths)
    return _log_probs(policy.output(params), hidden, responses, mask)


def score_with_collisions(
    policy: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B *S"],
    responses: Int[Array, "B K R"],
    response_lengths: Int[Array, "B *S K"],
) -> tuple[Float[Array, "B K R"], Float[Array, "B K R"]]:
    """`score`, and `losses.token_log_collision` of every token, without gradient, from the same hidden states."""
    hidden, mask = _predicting(policy, params, prompts, prompt_lengths, responses, response_lengths)
    output = policy.output(params)
    fixed = jax.lax.stop_gradient((hidden, output.embedding))
    collisions = losses.token_log_collision(*fixed, scale=output.scale, soft_cap=output.soft_cap)
    return _log_probs(output, hidden, responses, mask), jnp.where(mask, collisions, 0.0)


def _predicting(
    policy: Policy,
    params: Any,
    prompts: Int[Array, "B P"],
    prompt_lengths: Int[Array, "B *S"],
    responses: Int[Array, "B K R"],
    response_lengths: Int[Array, "B *S K"],
) -> tuple[Float[Array, "B K R D"], Bool[Array, "B K R"]]:
    """Hidden states that predict the responses' tokens, and a mask that is false at padding."""
    packing = None
    if prompt_lengths.ndim == 2:
        packing = Packing.of(prompt_lengths, response_lengths, prompts.shape[-1], responses.shape[-1])
    hidden = response_hidden(policy, params, prompts, prompt_lengths, responses, packing)
    mask = packing.is_response if packing else jnp.arange(responses.shape[-1]) < response_lengths[..., None]
    return hidden, mask


def _log_probs(output: Output, hidden: Array, responses: Array, mask: Array) -> Float[Array, "B K R"]:
    embedding, scale, soft_cap = output
    parts = parts_within(len(embedding), "vocab")
    log_probs = losses.token_log_probs(
        hidden, embedding, responses, scale=scale, soft_cap=soft_cap, vocabulary_parts=parts
    )
    return jnp.where(mask, log_probs, 0.0)


def compute_params(policy: Policy, params: Any) -> Any:
    """Casts the parameters to the dtype of the computation, except norms, position biases and a reward head.

    Each use casts the others anyway, so results do not change. But a loop over tokens then reads half the bytes.
    Kernels in int8 stay so.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        name, module = path[-1].key, path[-2].key
        stays = name == "rel_embedding" or module.endswith("norm") or path[0].key == HEAD
        return leaf if stays else leaf.astype(policy.config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda node: not isinstance(node, Mapping))


# Tracing `init` is the slow part of finding a state's shapes, and a study opens the same network often.
@functools.lru_cache(maxsize=16)
def abstract_parameters(init: Callable[[Array], Any]) -> Any:
    """Shapes and dtypes of the parameters that a policy's `init` returns, in boxes with their logical axes."""
    return jax.eval_shape(lambda: init(jax.random.key(0)))


def count_parameters(policy: Policy) -> int:
    """Number of parameters, without allocating them."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(policy.init)))


def check_sizes(config: Any) -> None:
    """Raises UserError, with field, value and remedy, if a number is not positive or a setting is invalid."""
    name = type(config).__name__
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if value <= 0:
            remedy = "it must be positive, or None" if field.default is None else "it must be positive"
            raise UserError(f"{name}.{field.name} is {value}: {remedy}")
    check_choice(config, "remat", tuple(REMAT_POLICIES))
    check_choice(config, "dtype", ("float32", "bfloat16"))
    heads, kv_heads = config.heads, getattr(config, "kv_heads", config.heads)
    if heads % kv_heads:
        raise UserError(f"{name}.kv_heads is {kv_heads}: it must divide heads={heads}")


def check_choice(config: Any, field: str, choices: Sequence[str]) -> None:
    """Raises UserError if a setting is not one of its choices."""
    value = getattr(config, field)
    if value not in choices:
        raise UserError(f"{type(config).__name__}.{field} is {value!r}: choose one of {', '.join(choices)}")
