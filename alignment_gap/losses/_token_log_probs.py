"""Log-probs and divergences of tokens from hidden states, without the logits of all tokens at once.

The logits [tokens, vocabulary] take most of the memory of preference training. Here they exist for one block of tokens
at a time; the backward pass computes them again, block by block. If all tokens fit in one block, there is no loop. With
n blocks, a block takes every n-th token: a batch that is sharded over devices is then sharded in each block too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from alignment_gap.losses._regularizers import categorical_kl, entropy
from alignment_gap.losses._shapes import Array, Float, Int

# Float32 logits of one block, per device.
_BLOCK_BYTES = 2**26


def token_log_probs(
    hidden: Float[Array, "*B D"],
    output_embedding: Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    block_size: int | None = None,
) -> Float[Array, "*B"]:
    """Log-probs of target tokens, from hidden states and the output embedding.

    z[target] - logsumexp(z), where z = scale hidden @ output_embedding^T, then z = soft_cap tanh(z / soft_cap) if a cap
    is given. The matrix product accumulates in float32. The backward pass rounds the logits' cotangent to the dtype of
    `hidden`, multiplies, and accumulates in float32 too.

    Args:
      hidden: [*B, D], the last hidden states.
      output_embedding: [V, D]; its vocabulary axis may be sharded over a mesh.
      targets: [*B], token ids in [0, V).
      scale: factor on the logits.
      soft_cap: bound on the absolute logits, or None.
      block_size: tokens in a block (over all devices); None chooses 64 MiB of logits per device.

    Returns:
      float32 [*B], nats; one value per token, without a mask. Sum them where the response's mask is true.

    Raises:
      ValueError: block_size is not positive.
      AssertionError: shapes or types do not fit.
    """
    chex.assert_type([hidden, output_embedding, targets], [float, float, int])
    _check_hidden(hidden, output_embedding)
    chex.assert_shape(targets, hidden.shape[:-1])
    blocks = _number_of_blocks(targets.size, output_embedding.shape[0], block_size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if blocks == 1:
        logits = _logits(flat, output_embedding, scale, soft_cap)
        log_probs = _at(logits, targets.reshape(-1)) - jax.nn.logsumexp(logits, axis=-1)
    else:
        log_probs = _blocked_log_probs(scale, soft_cap, blocks, flat, output_embedding, targets.reshape(-1))
    return log_probs.reshape(targets.shape)


def token_kl(
    hidden_p: Float[Array, "*B D"],
    embedding_p: Float[Array, "V D"],
    hidden_q: Float[Array, "*B E"],
    embedding_q: Float[Array, "V E"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    block_size: int | None = None,
) -> Float[Array, "*B"]:
    """Exact categorical KL(p || q) of every token, from the hidden states of two models.

    sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary; p and q are the softmax of logits as in
    `token_log_probs`. It is differentiable in both models; stop the gradient of a reference yourself. arXiv 2405.08448
    sums it over the response.

    Args:
      hidden_p, hidden_q: `[*B, D]` and `[*B, E]`, the last hidden states of the two models.
      embedding_p, embedding_q: [V, D] and [V, E], their output embeddings, with the same vocabulary.
      scale: factor on the logits of both models; if only one model has a scale, fold it into its hidden states.
      soft_cap: bound on the absolute logits of both models, or None.
      block_size: tokens in a block (over all devices); None chooses 64 MiB of logits per device.

    Returns:
      float32 [*B], nats; one value per token, without a mask. Sum them where the response's mask is true.

    Raises:
      ValueError: block_size is not positive.
      AssertionError: shapes or types do not fit.
    """
    chex.assert_type([hidden_p, embedding_p, hidden_q, embedding_q], float)
    _check_hidden(hidden_p, embedding_p)
    _check_hidden(hidden_q, embedding_q)
    chex.assert_equal_shape_prefix((hidden_p, hidden_q), hidden_p.ndim - 1)
    chex.assert_equal_shape_prefix((embedding_p, embedding_q), 1)

    def kl(hidden_p: Array, hidden_q: Array, embedding_p: Array, embedding_q: Array) -> Array:
        return categorical_kl(
            _logits(hidden_p, embedding_p, scale, soft_cap), _logits(hidden_q, embedding_q, scale, soft_cap)
        )

    flat = [hidden.reshape(-1, hidden.shape[-1]) for hidden in (hidden_p, hidden_q)]
    # A block holds the logits of two models.
    blocks = _number_of_blocks(len(flat[0]), 2 * embedding_p.shape[0], block_size)
    return _in_blocks(kl, blocks, flat, (embedding_p, embedding_q)).reshape(hidden_p.shape[:-1])


def token_entropy(
    hidden: Float[Array, "*B D"],
    output_embedding: Float[Array, "V D"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    block_size: int | None = None,
) -> Float[Array, "*B"]:
    """Entropy of every token's distribution, from hidden states.

    -sum_v p(v) log p(v), where p is the softmax of logits as in `token_log_probs`.

    Args:
      hidden: [*B, D], the last hidden states.
      output_embedding: [V, D].
      scale, soft_cap, block_size: as in `token_log_probs`.

    Returns:
      float32 [*B], nats; one value per token, without a mask.

    Raises:
      ValueError: block_size is not positive.
      AssertionError: shapes or types do not fit.
    """
    return _of_logits(entropy, hidden, output_embedding, scale, soft_cap, block_size)


def token_log_collision(
    hidden: Float[Array, "*B D"],
    output_embedding: Float[Array, "V D"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    block_size: int | None = None,
) -> Float[Array, "*B"]:
    """Log-probability that two samples from a token's distribution are equal, from hidden states.

    log sum_v p(v)^2, where p is the softmax of logits as in `token_log_probs`; `wpo` uses it. arXiv 2406.11827.

    Args:
      hidden: [*B, D], the last hidden states.
      output_embedding: [V, D].
      scale, soft_cap, block_size: as in `token_log_probs`.

    Returns:
      float32 [*B], nats; one value per token, without a mask.

    Raises:
      ValueError: block_size is not positive.
      AssertionError: shapes or types do not fit.
    """

    def log_collision(logits: Float[Array, "T V"]) -> Float[Array, " T"]:
        return jax.nn.logsumexp(2.0 * jax.nn.log_softmax(logits), axis=-1)

    return _of_logits(log_collision, hidden, output_embedding, scale, soft_cap, block_size)


def _of_logits(
    function: Callable[[Array], Array],
    hidden: Array,
    embedding: Array,
    scale: float,
    soft_cap: float | None,
    block_size: int | None,
) -> Array:
    chex.assert_type([hidden, embedding], float)
    _check_hidden(hidden, embedding)
    flat = hidden.reshape(-1, hidden.shape[-1])
    blocks = _number_of_blocks(len(flat), embedding.shape[0], block_size)

    def of_block(hidden: Array, embedding: Array) -> Array:
        return function(_logits(hidden, embedding, scale, soft_cap))

    return _in_blocks(of_block, blocks, [flat], (embedding,)).reshape(hidden.shape[:-1])


def _check_hidden(hidden: Array, embedding: Array) -> None:
    chex.assert_rank(embedding, 2)
    chex.assert_axis_dimension(hidden, -1, embedding.shape[1])


def _number_of_blocks(tokens: int, vocabulary: int, block_size: int | None) -> int:
    """The number of blocks: a power of two, because the number of tokens is usually a multiple of one."""
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    size = block_size or max(_BLOCK_BYTES * devices // (4 * vocabulary), 1)
    wanted = -(-tokens // size)
    return 1 << max(wanted - 1, 0).bit_length()


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Contracts one axis of `a` with one axis of `b`, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _logits(hidden: Array, embedding: Array, scale: float, soft_cap: float | None) -> Float[Array, "T V"]:
    logits = scale * _dot(hidden, embedding.astype(hidden.dtype), (1, 1))
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _at(logits: Float[Array, "T V"], targets: Int[Array, " T"]) -> Float[Array, " T"]:
    """Each row's value at its target. A masked sum needs no gather when the vocabulary is sharded over a mesh."""
    return jnp.sum(jnp.where(_is_target(logits, targets), logits, 0.0), axis=-1)


def _is_target(logits: Array, targets: Array) -> Array:
    return lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]


def _split(array: Array, blocks: int) -> Array:
    """Reshapes [T, ...] to [blocks, T / blocks, ...], padded with zeros; a block holds every `blocks`-th row."""
    padding = -len(array) % blocks
    array = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1)) if padding else array
    return jnp.swapaxes(array.reshape(-1, blocks, *array.shape[1:]), 0, 1)


def _join(array: Array, rows: int) -> Array:
    """Undoes `_split`."""
    return jnp.swapaxes(array, 0, 1).reshape(-1, *array.shape[2:])[:rows]


def _in_blocks(function: Callable[..., Array], blocks: int, rows: list[Array], constants: tuple[Array, ...]) -> Array:
    """Computes function(*rows, *constants) block by block; the backward pass computes each block again."""
    if blocks == 1:
        return function(*rows, *constants)
    step = jax.checkpoint(lambda block: function(*block, *constants))
    return _join(lax.map(step, [_split(array, blocks) for array in rows]), len(rows[0]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocked_log_probs(
    scale: float, soft_cap: float | None, blocks: int, hidden: Array, embedding: Array, targets: Array
) -> Array:
    return _blocked_forward(scale, soft_cap, blocks, hidden, embedding, targets)[0]


def _blocked_forward(
    scale: float, soft_cap: float | None, blocks: int, hidden: Array, embedding: Array, targets: Array
) -> tuple[Array, Any]:
    def step(block: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = _logits(block[0], embedding, scale, soft_cap)
        return _at(logits, block[1]), jax.nn.logsumexp(logits, axis=-1)

    at_targets, normalizer = lax.map(step, (_split(hidden, blocks), _split(targets, blocks)))
    return _join(at_targets - normalizer, len(targets)), (hidden, embedding, targets, normalizer)


def _blocked_backward(
    scale: float, soft_cap: float | None, blocks: int, residuals: Any, cotangent: Array
) -> tuple[Array, Array, None]:
    hidden, embedding, targets, normalizer = residuals

    def step(d_embedding: Array, block: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        hidden, targets, normalizer, cotangent = block
        logits = _logits(hidden, embedding, scale, soft_cap)
        slope = scale if soft_cap is None else scale * (1.0 - jnp.square(logits / soft_cap))
        residual = _is_target(logits, targets).astype(jnp.float32) - jnp.exp(logits - normalizer[:, None])
        d_logits = (slope * cotangent[:, None] * residual).astype(hidden.dtype)
        d_hidden = _dot(d_logits, embedding.astype(hidden.dtype), (1, 0)).astype(hidden.dtype)
        return d_embedding + _dot(d_logits, hidden, (0, 0)), d_hidden

    rows = (_split(hidden, blocks), _split(targets, blocks), normalizer, _split(cotangent, blocks))
    d_embedding, d_hidden = lax.scan(step, jnp.zeros(embedding.shape, jnp.float32), rows)
    return _join(d_hidden, len(hidden)), d_embedding.astype(embedding.dtype), None


_blocked_log_probs.defvjp(_blocked_forward, _blocked_backward)
