"""Packed rows: positions by hand, and the same scores and gradients as for unpacked rows."""

import dataclasses
import functools
from functools import partial

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from tiny_models import CONFIGS, SETTINGS, make_batch, random_params, texts

from alignment_gap.data.batches.packing import Rows
from alignment_gap.errors import UserError
from alignment_gap.models import fused_attention, make_policy, score
from alignment_gap.models.packing import Packing, Places, unpack

BATCH = make_batch(8)
# Eight prompts in three rows of four slots. The fullest row has no padding; two rows have empty slots.
ROWS = np.array([0, 0, 0, 0, 1, 1, 2, 2])
SLOTS = np.array([0, 1, 2, 3, 4, 5, 8, 9])


def fullest(lengths):
    return int(np.stack([np.asarray(lengths)[row == ROWS].sum(axis=0) for row in range(3)]).max())


SHAPE = fullest(BATCH.prompt_lengths), fullest(BATCH.response_lengths)
PACKED = jax.tree.map(jnp.asarray, Rows(SHAPE, 4, 1).pack(BATCH, ROWS))


def test_places_by_hand():
    # Two texts of two and three tokens, then one more; the rest is padding.
    places = Places.of(jnp.array([[2, 3, 1], [1, 0, 4]]), 7)
    np.testing.assert_array_equal(places.slot, [[0, 0, 1, 1, 1, 2, 3], [0, 2, 2, 2, 2, 3, 3]])
    np.testing.assert_array_equal(places.position[0, :6], [0, 1, 0, 1, 2, 0])
    np.testing.assert_array_equal(places.position[1, :5], [0, 0, 1, 2, 3])


def test_who_sees_whom_by_hand():
    """Prompts of two tokens and of one, with a response each, of one token and of two; then padding."""
    packing = Packing.of(jnp.array([[2, 1]]), jnp.array([[[1], [2]]]), 4, 4)
    prompts = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(packing.within_prompts()[0, 0], prompts)
    responses = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(packing.within_responses()[0, 0], responses)
    across = [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    np.testing.assert_array_equal(packing.across()[0, 0], across)
    np.testing.assert_array_equal(packing.is_response[0, 0], [1, 1, 1, 0])
    np.testing.assert_array_equal(packing.is_last()[0, :3], [0, 1, 1])
    # The first input of a response is the prompt's last token, at the position of this token.
    np.testing.assert_array_equal(packing.response_positions()[0, 0, :3], [1, 0, 1])


def test_unpack_by_hand():
    values = jnp.array([[[1.0, 2.0, 3.0, 9.0]]])
    rows, lengths = unpack(values, jnp.array([[[2], [0], [1]]]), -5.0)
    np.testing.assert_array_equal(rows[:, 0], [[1, 2, 0, 0], [-5, 0, 0, 0], [3, 0, 0, 0]])
    np.testing.assert_array_equal(lengths, [[2], [1], [1]])


# All examples have one shape, so nothing compiles again.
SLOTS_OF_ROW, ROW_SIZE = 3, 10


def row_lengths(columns):
    return strategies.lists(
        strategies.tuples(*[strategies.integers(0, 3)] * columns), min_size=SLOTS_OF_ROW, max_size=SLOTS_OF_ROW
    )


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(lengths=row_lengths(3))
def test_a_packed_row_token_by_token(lengths):
    """A loop over texts checks every token. Slots have a prompt and two responses each, or are empty."""
    # A slot is empty, or it has a prompt and at least one token of each response.
    lengths = np.array([(a, max(b, 1), max(c, 1)) if a else (0, 0, 0) for a, b, c in lengths])
    prompt_size = response_size = ROW_SIZE
    packing = Packing.of(
        jnp.asarray(lengths[None, :, 0]), jnp.asarray(lengths[None, :, 1:]), prompt_size, response_size
    )

    def texts(column, size):
        """(slot, position) of each token; None at padding."""
        row = [(slot, place) for slot, length in enumerate(lengths[:, column]) for place in range(length)]
        return row + [None] * (size - len(row))

    prompts, rows = texts(0, prompt_size), [texts(1 + k, response_size) for k in range(2)]
    last = np.asarray(packing.is_last()[0])
    for place, text in enumerate(prompts):
        if text:
            assert (int(packing.prompts.slot[0, place]), int(packing.prompts.position[0, place])) == text
            assert bool(last[place]) == (text[1] == lengths[text[0], 0] - 1)
    within, across, inside = (
        np.asarray(x[0]) for x in (packing.within_prompts(), packing.across(), packing.within_responses())
    )
    positions, real = np.asarray(packing.response_positions()[0]), np.asarray(packing.is_response[0])
    for a, b in np.ndindex(prompt_size, prompt_size):
        assert within[0, a, b] == ((prompts[a] or (None,))[0] == (prompts[b] or (None,))[0])
    for k, row in enumerate(rows):
        assert real[k].tolist() == [text is not None for text in row]
        for a, text in enumerate(row):
            if text is None:
                continue
            # The first input of a response is the prompt's last token, at the position of this token.
            assert positions[k, a] == lengths[text[0], 0] - 1 + text[1]
            assert across[k, a].tolist() == [other is not None and other[0] == text[0] for other in prompts]
            assert inside[k, a].tolist() == [other is not None and other[0] == text[0] for other in row]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(lengths=row_lengths(2))
def test_what_is_unpacked_are_the_responses_one_by_one(lengths):
    lengths = np.array(lengths)
    size = ROW_SIZE
    values = np.arange(1.0, 1 + 2 * size).reshape(1, 2, size).astype(np.float32)
    rows, found = unpack(jnp.asarray(values), jnp.asarray(lengths[None]), -5.0)
    assert rows.shape == (len(lengths), 2, size)
    starts = np.cumsum(lengths, axis=0) - lengths
    for slot, k in np.ndindex(len(lengths), 2):
        start, length = starts[slot, k], lengths[slot, k]
        kept = values[0, k, start : start + length].tolist() if length else [-5.0]
        assert rows[slot, k].tolist() == kept + [0.0] * (size - len(kept))
        assert found[slot, k] == max(length, 1)


def value_and_gradient(policy, batch, log_probs_of):
    """Log-probs [8, 2, 5], and the gradient of their weighted sum; each token has its own weight."""

    def total(params):
        log_probs = log_probs_of(score(policy, params, *texts(batch)))
        return jnp.sum(log_probs * jnp.linspace(0.5, 1.5, log_probs.size).reshape(log_probs.shape)), log_probs

    (_, log_probs), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(random_params(policy))
    return log_probs, gradient


def one_by_one(log_probs):
    rows, _ = unpack(log_probs, PACKED.response_lengths, 0.0)
    return rows[SLOTS, :, :5]


@functools.cache
def unpacked(config):
    return value_and_gradient(make_policy(config), BATCH, lambda x: x)


def assert_equal_to_unpacked(config):
    plain = unpacked(dataclasses.replace(config, attention="xla"))
    packed = value_and_gradient(make_policy(config), PACKED, one_by_one)
    np.testing.assert_allclose(packed[0], plain[0], rtol=1e-4, atol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), packed[1], plain[1])


# Packing changes masks and positions. Only windows and rotary bases depend on them; Gemma 3 has a window and two bases.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "decoder", "gemma3"])
def test_packed_rows_have_the_scores_and_gradients_of_their_prompts(name):
    """Gemma 3's windows are shorter than a prompt with its response."""
    assert_equal_to_unpacked({**CONFIGS, **SETTINGS}[name])


def test_packed_rows_by_splash():
    assert_equal_to_unpacked(dataclasses.replace(CONFIGS["decoder"], attention="splash"))


@pytest.mark.slow
def test_packed_rows_by_t5s_kernel():
    assert_equal_to_unpacked(dataclasses.replace(CONFIGS["t5"], attention="pallas"))


def test_packed_rows_by_cudnns_form(monkeypatch):
    monkeypatch.setattr(fused_attention, "CUDNN", "xla")
    monkeypatch.setattr(fused_attention, "check", lambda config: None)
    assert_equal_to_unpacked(dataclasses.replace(SETTINGS["qwen3"], attention="cudnn"))


def test_windows_of_a_fused_kernel_are_refused():
    policy = make_policy(dataclasses.replace(SETTINGS["gemma2"], attention="splash"))
    with pytest.raises(UserError, match="no windows in packed rows: use attention=xla, or buckets instead of packing"):
        jax.eval_shape(partial(score, policy), random_params(policy), *texts(PACKED))
