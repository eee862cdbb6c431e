"""Log-probs and divergences of tokens from hidden states, without the logits of all tokens at once.

The logits [tokens, vocabulary] take most of the memory of preference training. So the functions here hold one block of
them at a time, and the backward pass computes each block again. One block that holds all logits needs no loop. With n
blocks, a block takes every n-th row: an axis that is sharded over devices is then sharded in each block too.

`token_log_probs` splits the vocabulary. So a block has all tokens; each row of the output embedding is gathered, and
its gradient summed over devices, only once. A split of the tokens would do both for all rows in every block. The rarer
divergences and entropies split the tokens, which serves any function of the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from alignment_gap.losses._checks import check_kind, check_shape
from alignment_gap.losses._regularizers import categorical_kl, entropy
from alignment_gap.losses._shapes import Array, Bool, Float, Int

# Float32 logits of one block, per device.
_BLOCK_BYTES = 2**26
# Rows of the output embedding in a block, at least: fewer would spend the time on reading and writing sums over blocks.
_LEAST_ROWS = 512


def token_log_probs(
    hidden: Float[Array, "*B D"],
    output_embedding: Float[Array, "V D"],
    targets: Int[Array, "*B"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    block_size: int | None = None,
    vocabulary_parts: int = 1,
) -> Float[Array, "*B"]:
    """Log-probs of target tokens, from hidden states and the output embedding.

    z[target] - logsumexp(z), where z = scale hidden @ output_embedding^T, then z = soft_cap tanh(z / soft_cap) if a cap
    is given. The matrix product accumulates in float32. With several blocks, the backward pass rounds the logits'
    cotangent to the dtype of `hidden`, multiplies, and accumulates in float32 too. One block keeps the cotangent in
    float32.

    Args:
      hidden: [*B, D], the last hidden states.
      output_embedding: [V, D]; its vocabulary axis may be sharded over a mesh.
      targets: [*B], token ids in [0, V).
      scale: factor on the logits.
      soft_cap: bound on the absolute logits, or None.
      block_size: rows of the output embedding in a block (over all devices); None chooses 64 MiB of logits per device,
        but at least 512 rows of each part.
      vocabulary_parts: number of equal parts in which a mesh splits the vocabulary axis. Each part has sums of its own,
        which are added after the last block. The result is right for any number that divides V.

    Returns:
      float32 [*B], nats; one value per token, without a mask. Sum them where the response's mask is true.

    Raises:
      ValueError: block_size is not positive, or vocabulary_parts does not divide V.
      AssertionError: shapes or types do not fit.
    """
    _check_hidden(hidden=hidden, output_embedding=output_embedding)
    check_kind("integer", targets=targets)
    check_shape(hidden.shape[:-1], targets=targets)
    vocabulary = len(output_embedding)
    if vocabulary_parts < 1 or vocabulary % vocabulary_parts:
        raise ValueError(f"vocabulary_parts must divide the vocabulary of {vocabulary}, got {vocabulary_parts}")
    blocks = _number_of_blocks(vocabulary, targets.size, block_size, least=_LEAST_ROWS * vocabulary_parts)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if blocks == 1:
        logits = _logits(flat, output_embedding, scale, soft_cap)
        log_probs = _at(logits, targets.reshape(-1)) - jax.nn.logsumexp(logits, axis=-1)
    else:
        split = _Split(vocabulary // vocabulary_parts, blocks)
        parts = output_embedding.reshape(vocabulary_parts, split.rows, -1)
        log_probs = _blocked_log_probs(scale, soft_cap, split, flat, parts, targets.reshape(-1))
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
    _check_hidden(hidden_p=hidden_p, embedding_p=embedding_p)
    _check_hidden(hidden_q=hidden_q, embedding_q=embedding_q)
    # The two networks may have different widths.
    check_shape((*hidden_p.shape[:-1], hidden_q.shape[-1]), hidden_q=hidden_q)
    check_shape((len(embedding_p), embedding_q.shape[1]), embedding_q=embedding_q)

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
    _check_hidden(hidden=hidden, embedding=embedding)
    flat = hidden.reshape(-1, hidden.shape[-1])
    blocks = _number_of_blocks(len(flat), embedding.shape[0], block_size)

    def of_block(hidden: Array, embedding: Array) -> Array:
        return function(_logits(hidden, embedding, scale, soft_cap))

    return _in_blocks(of_block, blocks, [flat], (embedding,)).reshape(hidden.shape[:-1])


def _check_hidden(**arrays: Array) -> None:
    """Checks hidden states and an output embedding, given by the names of their arguments in this order."""
    check_kind("floating", **arrays)
    (hidden_name, hidden), (embedding_name, embedding) = arrays.items()
    if embedding.ndim != 2:
        raise AssertionError(f"{embedding_name} has the shape {embedding.shape}: [V, D] is needed here")
    check_shape((*hidden.shape[:-1], embedding.shape[1]), **{hidden_name: hidden})


def _number_of_blocks(rows: int, others: int, block_size: int | None, least: int = 1) -> int:
    """The number of blocks of an axis of the logits: a power of two, because most axes are a multiple of one.

    Args:
      rows: size of the axis, over all devices.
      others: size of the other axis.
      block_size: entries in a block, or None.
      least: the fewest entries in a block, if none are given.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    size = block_size or max(_BLOCK_BYTES * devices // (4 * max(others, 1)), least)
    wanted = -(-rows // size)
    return 1 << max(wanted - 1, 0).bit_length()


def _dot(a: Array, b: Array, contract: tuple[int, int], batch: Any = ((), ())) -> Array:
    """Contracts one axis of `a` with one axis of `b`, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), batch)
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _logits(hidden: Array, embedding: Array, scale: float, soft_cap: float | None) -> Float[Array, "T V"]:
    return _capped(scale * _dot(hidden, embedding.astype(hidden.dtype), (1, 1)), soft_cap)


def _capped(logits: Array, soft_cap: float | None) -> Array:
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _at(logits: Float[Array, "T V"], targets: Int[Array, " T"]) -> Float[Array, " T"]:
    """Each row's value at its target. A masked sum needs no gather when the vocabulary is sharded over a mesh."""
    is_target = lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


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


class _Split(NamedTuple):
    """How each part of the vocabulary is split: block b has the rows b, b + blocks, b + 2 blocks and so on."""

    rows: int
    blocks: int

    def rows_of_blocks(self, embedding: Float[Array, "M S D"]) -> Float[Array, "M v N D"]:
        """The output embedding, padded with zeros; axis 2 is the block."""
        padded = jnp.pad(embedding, ((0, 0), (0, -self.rows % self.blocks), (0, 0)))
        return padded.reshape(len(embedding), -1, self.blocks, embedding.shape[-1])

    def joined(self, rows: Float[Array, "M v N D"]) -> Float[Array, "M S D"]:
        """Undoes `rows_of_blocks`."""
        return rows.reshape(len(rows), -1, rows.shape[-1])[:, : self.rows]

    def masked(self, x: Float[Array, "T M v"], block: Array, value: float) -> Float[Array, "T M v"]:
        """The values of a block, with this value at its padding."""
        if self.rows % self.blocks == 0:
            return x
        return jnp.where(jnp.arange(x.shape[-1]) * self.blocks + block < self.rows, x, value)

    def is_target(self, block: Array, targets: Int[Array, " T"], shape: tuple[int, ...]) -> Bool[Array, "T M v"]:
        """True where an entry of a block's logits is at the token's target. Unlike a gather, it needs no other part."""
        part, row = jnp.divmod(targets, self.rows)
        index = jnp.where(row % self.blocks == block, row // self.blocks, -1)[:, None, None]
        of_part = lax.broadcasted_iota(targets.dtype, shape, 1) == part[:, None, None]
        return of_part & (lax.broadcasted_iota(targets.dtype, shape, 2) == index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocked_log_probs(
    scale: float,
    soft_cap: float | None,
    split: _Split,
    hidden: Float[Array, "T D"],
    embedding: Float[Array, "M S D"],
    targets: Int[Array, " T"],
) -> Float[Array, " T"]:
    return _blocked_forward(scale, soft_cap, split, hidden, embedding, targets)[0]


def _blocked_forward(
    scale: float, soft_cap: float | None, split: _Split, hidden: Array, embedding: Array, targets: Array
) -> tuple[Array, Any]:
    def step(sums: tuple[Array, Array, Array], block: Array) -> tuple[tuple[Array, Array, Array], None]:
        top, total, at_target = sums
        logits = _block_logits(hidden, _block_of(table, block), scale, soft_cap)
        at_target += jnp.sum(jnp.where(split.is_target(block, targets, logits.shape), logits, 0.0), axis=-1)
        logits = split.masked(logits, block, -jnp.inf)
        highest = jnp.maximum(top, logits.max(axis=-1))
        total = total * jnp.exp(top - highest) + jnp.exp(logits - highest[..., None]).sum(axis=-1)
        return (highest, total, at_target), None

    table = split.rows_of_blocks(embedding.astype(hidden.dtype))
    zeros = jnp.zeros((len(targets), len(embedding)), jnp.float32)
    (top, total, at_target), _ = lax.scan(step, (zeros - jnp.inf, zeros, zeros), jnp.arange(split.blocks))
    normalizer = jax.nn.logsumexp(top + jnp.log(total), axis=-1)
    return at_target.sum(axis=-1) - normalizer, (hidden, embedding, targets, normalizer)


def _blocked_backward(
    scale: float, soft_cap: float | None, split: _Split, residuals: Any, cotangent: Array
) -> tuple[Array, Array, None]:
    hidden, embedding, targets, normalizer = residuals

    def step(sums: tuple[Array, Array], block: Array) -> tuple[tuple[Array, Array], None]:
        (d_hidden, d_table), rows = sums, _block_of(table, block)
        logits = _block_logits(hidden, rows, scale, soft_cap)
        slope = scale if soft_cap is None else scale * (1.0 - jnp.square(logits / soft_cap))
        probability = jnp.exp(logits - normalizer[:, None, None])
        residual = split.is_target(block, targets, logits.shape).astype(jnp.float32) - probability
        d_logits = split.masked(slope * cotangent[:, None, None] * residual, block, 0.0).astype(hidden.dtype)
        d_hidden += _dot(d_logits, rows, (2, 1), ((1,), (0,)))
        flat = d_logits.reshape(len(hidden), rows.shape[0] * rows.shape[1])
        d_rows = _dot(flat, hidden, (0, 0)).reshape(rows.shape).astype(embedding.dtype)
        return (d_hidden, lax.dynamic_update_index_in_dim(d_table, d_rows, block, axis=2)), None

    table = split.rows_of_blocks(embedding.astype(hidden.dtype))
    zeros = jnp.zeros((len(embedding), *hidden.shape), jnp.float32), jnp.zeros(table.shape, embedding.dtype)
    (d_hidden, d_table), _ = lax.scan(step, zeros, jnp.arange(split.blocks))
    return d_hidden.sum(axis=0).astype(hidden.dtype), split.joined(d_table), None


_blocked_log_probs.defvjp(_blocked_forward, _blocked_backward)


def _block_of(table: Float[Array, "M v N D"], block: Array) -> Float[Array, "M v D"]:
    return lax.dynamic_index_in_dim(table, block, axis=2, keepdims=False)


def _block_logits(
    hidden: Float[Array, "T D"], rows: Float[Array, "M v D"], scale: float, soft_cap: float | None
) -> Float[Array, "T M v"]:
    """The logits of a block. On a mesh, the block's rows are gathered, because the hidden states are larger."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.are_all_axes_auto:
        unconstrained = PartitionSpec.UNCONSTRAINED
        rows = lax.with_sharding_constraint(rows, PartitionSpec(unconstrained, unconstrained, None))
    # In two axes: on a CPU, XLA would transpose a factor of three.
    logits = _dot(hidden, rows.reshape(-1, rows.shape[-1]), (1, 1)).reshape(len(hidden), *rows.shape[:2])
    return _capped(scale * logits, soft_cap)
