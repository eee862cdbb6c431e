"""Log-probs and divergences computed without the logits equal their plain forms."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from alignment_gap import losses
from alignment_gap.plan import hlo

TOKENS, VOCABULARY, WIDTH = (3, 50), 37, 16
KEYS = jax.random.split(jax.random.key(0), 6)
HIDDEN = jax.random.normal(KEYS[0], (*TOKENS, WIDTH))
EMBEDDING = jax.random.normal(KEYS[1], (VOCABULARY, WIDTH))
TARGETS = jax.random.randint(KEYS[2], TOKENS, 0, VOCABULARY)
WEIGHTS = jax.random.normal(KEYS[3], TOKENS)
OTHER_HIDDEN = jax.random.normal(KEYS[4], (*TOKENS, WIDTH + 1))
OTHER_EMBEDDING = jax.random.normal(KEYS[5], (VOCABULARY, WIDTH + 1))
FORMS = [{}, {"scale": 0.25}, {"soft_cap": 3.0}, {"scale": 0.5, "soft_cap": 2.0}]
# None is one block. 16 divides neither 150 tokens nor a vocabulary of 37. 1 gives every row its own block.
CASES = [*((form, block_size) for form in FORMS for block_size in (None, 16)), ({}, 1), ({}, 20)]


def plain_logits(hidden, embedding, scale=1.0, soft_cap=None):
    logits = scale * jnp.einsum("...d,vd->...v", hidden, embedding)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def plain_log_probs(hidden, embedding, **form):
    log_probs = jax.nn.log_softmax(plain_logits(hidden, embedding, **form))
    return jnp.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]


def plain_kl(hidden_p, embedding_p, hidden_q, embedding_q, **form):
    p = jax.nn.softmax(plain_logits(hidden_p, embedding_p, **form))
    q = jax.nn.softmax(plain_logits(hidden_q, embedding_q, **form))
    return jnp.sum(p * jnp.log(p / q), axis=-1)


def assert_close(ours, plain):
    """Compares with a tolerance of 1e-5 relative to the scale of each array."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def value_and_gradients(function, *arrays):
    value, pullback = jax.vjp(function, *arrays)
    return value, pullback(WEIGHTS)


@pytest.mark.parametrize(("form", "block_size"), CASES, ids=str)
def test_value_and_gradients_equal_the_plain_form(form, block_size):
    def ours(hidden, embedding):
        return losses.token_log_probs(hidden, embedding, TARGETS, block_size=block_size, **form)

    def plain(hidden, embedding):
        return plain_log_probs(hidden, embedding, **form)

    assert_close(
        jax.jit(lambda *arrays: value_and_gradients(ours, *arrays))(HIDDEN, EMBEDDING),
        value_and_gradients(plain, HIDDEN, EMBEDDING),
    )


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("block_size", [None, 16])
def test_kl_equals_the_plain_form(form, block_size):
    def ours(*arrays):
        return losses.token_kl(*arrays, block_size=block_size, **form)

    def plain(*arrays):
        return plain_kl(*arrays, **form)

    arrays = (HIDDEN, EMBEDDING, OTHER_HIDDEN, OTHER_EMBEDDING)
    assert_close(
        jax.jit(lambda *arrays: value_and_gradients(ours, *arrays))(*arrays), value_and_gradients(plain, *arrays)
    )


@pytest.mark.parametrize("block_size", [None, 16])
def test_entropy_and_collision(block_size):
    p = jax.nn.softmax(plain_logits(HIDDEN, EMBEDDING, 0.5))
    entropy = losses.token_entropy(HIDDEN, EMBEDDING, scale=0.5, block_size=block_size)
    np.testing.assert_allclose(entropy, -jnp.sum(p * jnp.log(p), axis=-1), rtol=1e-5, atol=1e-6)
    collision = losses.token_log_collision(HIDDEN, EMBEDDING, scale=0.5, block_size=block_size)
    np.testing.assert_allclose(collision, jnp.log(jnp.sum(p**2, axis=-1)), rtol=1e-5, atol=1e-6)


def test_golden():
    # Logits (0, log 3): -log 4 and log(3/4).
    hidden, embedding = jnp.ones((2, 1)), jnp.log(jnp.array([[1.0], [3.0]]))
    np.testing.assert_allclose(
        losses.token_log_probs(hidden, embedding, jnp.array([0, 1])), np.log([0.25, 0.75]), rtol=1e-6
    )
    # Against (1/2, 1/2): log 2 - H(1/4, 3/4).
    kl = losses.token_kl(hidden, embedding, jnp.zeros((2, 1)), embedding)
    np.testing.assert_allclose(kl, np.log(2) + 0.25 * np.log(0.25) + 0.75 * np.log(0.75), rtol=1e-5)


@pytest.mark.parametrize("block_size", [None, 16])
def test_bfloat16_accumulates_in_float32(block_size):
    hidden, embedding = HIDDEN.astype(jnp.bfloat16), EMBEDDING.astype(jnp.bfloat16)
    value, (d_hidden, d_embedding) = value_and_gradients(
        lambda *arrays: losses.token_log_probs(*arrays, TARGETS, block_size=block_size), hidden, embedding
    )
    assert value.dtype == jnp.float32
    assert d_hidden.dtype == d_embedding.dtype == jnp.bfloat16
    # Products of bfloat16 are exact in float32. So the values equal those of the inputs cast to float32.
    wide = value_and_gradients(plain_log_probs, hidden.astype(jnp.float32), embedding.astype(jnp.float32))
    np.testing.assert_allclose(value, wide[0], rtol=1e-5, atol=1e-5)
    for ours, exact in zip((d_hidden, d_embedding), wide[1], strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=0.02, atol=0.02 * np.abs(exact).max())


@pytest.mark.parametrize("block_size", [None, 16])
def test_extreme_logits_are_finite(block_size):
    value, gradients = value_and_gradients(
        lambda *arrays: losses.token_log_probs(*arrays, TARGETS, block_size=block_size), 1e3 * HIDDEN, 1e3 * EMBEDDING
    )
    assert np.all(np.isfinite(value))
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("block_size", [None, 16])
def test_no_tokens_have_no_log_probs(block_size):
    value, pullback = jax.vjp(
        lambda *arrays: losses.token_log_probs(*arrays, TARGETS[:0], block_size=block_size), HIDDEN[:0], EMBEDDING
    )
    d_hidden, d_embedding = pullback(value)
    assert value.shape == (0, TOKENS[1])
    assert d_hidden.shape == (0, *HIDDEN.shape[1:])
    np.testing.assert_array_equal(d_embedding, np.zeros_like(EMBEDDING))


def test_vmap_equals_the_batch():
    def one(hidden, targets):
        return losses.token_log_probs(hidden, EMBEDDING, targets, block_size=16)

    np.testing.assert_allclose(jax.vmap(one)(HIDDEN, TARGETS), plain_log_probs(HIDDEN, EMBEDDING), rtol=1e-5, atol=1e-5)


def test_small_sizes_have_no_loop():
    def program(block_size):
        def gradients(hidden, embedding, targets):
            return value_and_gradients(
                lambda *arrays: losses.token_log_probs(*arrays, targets, block_size=block_size), hidden, embedding
            )

        return str(jax.make_jaxpr(gradients)(HIDDEN, EMBEDDING, TARGETS))

    assert "scan" not in program(None)
    assert "scan" in program(16)


def test_parts_must_divide_the_vocabulary():
    for parts in (0, 2):
        with pytest.raises(ValueError, match=f"must divide the vocabulary of 37, got {parts}"):
            losses.token_log_probs(HIDDEN, EMBEDDING, TARGETS, vocabulary_parts=parts)


@pytest.mark.usefixtures("unchecked")
def test_shapes_are_checked_first():
    with pytest.raises(AssertionError):
        losses.token_log_probs(HIDDEN, EMBEDDING, TARGETS[:2])
    with pytest.raises(AssertionError):
        losses.token_log_probs(HIDDEN, EMBEDDING.T, TARGETS)
    with pytest.raises(AssertionError):
        losses.token_log_probs(HIDDEN, EMBEDDING, TARGETS.astype(jnp.float32))
    with pytest.raises(AssertionError):
        losses.token_kl(HIDDEN, EMBEDDING, OTHER_HIDDEN, OTHER_EMBEDDING[:-1])


def peak_memory(function, *shapes):
    """Temporary bytes of the value and all gradients; compiles, but does not run."""

    def run(weights, *arrays):
        value, pullback = jax.vjp(function, *arrays)
        return value, pullback(weights)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (shapes[0][:-1], *shapes)]
    return jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_peak_memory_at_a_real_size():
    """At most an eighth of the plain form's, at 8,192 tokens, a vocabulary of 32,128 and a width of 1,024."""
    targets = jnp.zeros(8192, jnp.int32)
    hidden, embedding = (8192, 1024), (32128, 1024)

    def plain(hidden, embedding):
        log_probs = jax.nn.log_softmax(hidden @ embedding.T)
        return jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]

    def blocked(hidden, embedding):
        return losses.token_log_probs(hidden, embedding, targets)

    assert peak_memory(blocked, hidden, embedding) <= peak_memory(plain, hidden, embedding) / 8
    both = (hidden, embedding, hidden, embedding)
    assert peak_memory(losses.token_kl, *both) <= peak_memory(plain_kl, *both) / 8


# With 8 blocks, a part of 10 rows has padding.
@pytest.mark.parametrize(("vocabulary", "block_size", "parts"), [(40, None, 1), (64, 16, 1), (64, 16, 4), (40, 8, 4)])
def test_vocabulary_and_batch_split_over_a_mesh(vocabulary, block_size, parts):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))
    hidden = jax.random.normal(KEYS[0], (4, 16, WIDTH))
    embedding = jax.random.normal(KEYS[1], (vocabulary, WIDTH))
    targets = jax.random.randint(KEYS[2], (4, 16), 0, vocabulary)
    weights = jax.random.normal(KEYS[3], (4, 16))

    def run(hidden, embedding, targets, weights):
        value, pullback = jax.vjp(
            lambda *arrays: losses.token_log_probs(*arrays, targets, block_size=block_size, vocabulary_parts=parts),
            hidden,
            embedding,
        )
        kl = losses.token_kl(hidden, embedding, 0.5 * hidden, embedding, block_size=block_size)
        return value, pullback(weights), kl

    batch, by_row = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec("model"))
    split = jax.jit(
        run,
        in_shardings=(batch, by_row, batch, batch),
        out_shardings=(batch, (batch, by_row), batch),
    )
    arrays = (hidden, embedding, targets, weights)
    layouts = (batch, by_row, batch, batch)
    placed = [jax.device_put(array, layout) for array, layout in zip(arrays, layouts, strict=True)]
    assert_close(split(*placed), run(*arrays))
    # No device ever holds all of the vocabulary, neither as logits nor as embedding, in any communication.
    program = split.lower(*arrays).compile().as_text()
    assert not re.findall(rf"\[(?:\d+,)*{vocabulary}(?:,\d+)*\]", program)


@pytest.mark.parametrize("blocks", [2, 8])
def test_a_mesh_gathers_each_row_once_for_any_number_of_blocks(blocks):
    """Value and gradient gather the output embedding once each, and sum its gradient once."""
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    mesh, (tokens, rows, width) = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,)), (256, 1024, 64)

    def run(hidden, embedding, targets, weights):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            value, pullback = jax.vjp(
                lambda *arrays: losses.token_log_probs(*arrays, targets, block_size=rows // blocks), hidden, embedding
            )
            return value, pullback(weights)

    by_token, by_width = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    shapes = [((tokens, width), jnp.float32, by_token), ((rows, width), jnp.float32, by_width)]
    shapes += [((tokens,), dtype, by_token) for dtype in (jnp.int32, jnp.float32)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in shapes]
    program = jax.jit(run, out_shardings=(by_token, (by_token, by_width))).lower(*arrays).compile()
    moved = collections.Counter()
    for each in hlo.collectives(hlo.parse(program.as_text()), 8):
        moved[each.kind] += each.bytes * each.count
    assert moved == {"all-gather": 2 * rows * width * 4, "all-reduce": rows * width * 4}
