"""A moving reference (TR-DPO): its moves by hand in real steps, and when it stays."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from tiny_models import MESHES, Unigram, make_batch

from alignment_gap import losses
from alignment_gap.sharding import batch_sharding, make_mesh
from alignment_gap.training import (
    abstract_state,
    create_state,
    make_moving,
    make_score,
    make_update_step,
    policy_objective,
    with_reference,
)

BETA, RATE, STEPS = 0.5, 0.3, 5
UNIGRAM, OPTIMIZER, REFERENCE = Unigram(), optax.sgd(RATE), "reference"
# All responses have equal lengths, so the partition function cancels in the log-ratio of a pair.
BATCH = dataclasses.replace(make_batch(8), response_lengths=np.full((8, 2), 5, np.int32))


def by_hand(every, alpha):
    """Logits of policy and reference after every step of DPO, in float64.

    Let d be the token counts of the chosen response minus those of the rejected one, and h = (logits - reference) . d.
    Then the gradient of -log sigma(beta h) is -beta sigma(-beta h) d.
    """
    responses, scores = np.asarray(BATCH.responses), np.asarray(BATCH.scores)
    counts = np.stack([[np.bincount(tokens, minlength=16) for tokens in pair] for pair in responses]).astype(float)
    rows = np.arange(len(scores))
    d = counts[rows, scores.argmax(1)] - counts[rows, scores.argmin(1)]
    logits = reference = np.linspace(-1.0, 1.0, 16)
    found = []
    for step in range(STEPS):
        if step and step % every == 0:
            reference = alpha * logits + (1 - alpha) * reference
        h = d @ (logits - reference)
        logits = logits + RATE * BETA * (d / (1 + np.exp(BETA * h))[:, None]).mean(0)
        found.append((logits, reference))
    return found


def rig(mesh, every, alpha, microbatches=1):
    abstract = abstract_state(UNIGRAM.init, OPTIMIZER, mesh, (REFERENCE,))
    objective = policy_objective(UNIGRAM, losses.get("dpo", beta=BETA))
    step = make_update_step(objective, OPTIMIZER, mesh, abstract, microbatches=microbatches)
    state = create_state(UNIGRAM.init, abstract, OPTIMIZER, jax.random.key(0))
    return state, step, make_moving(REFERENCE, every, alpha, abstract)


@pytest.mark.parametrize(
    ("every", "alpha", "layout", "microbatches"),
    [(2, 1.0, "data", 1), (2, 0.25, "data", 1), (1, 0.5, "all", 1), (2, 0.25, "two_by_four", 2)],
)
def test_policy_and_reference_are_those_by_hand(every, alpha, layout, microbatches):
    mesh = make_mesh(MESHES[layout])
    state, update, move = rig(mesh, every, alpha, microbatches)
    batch = jax.device_put(jax.tree.map(np.asarray, BATCH), batch_sharding(mesh))
    source = with_reference(lambda step, state: batch, make_score(UNIGRAM, mesh), lambda state: state.copies[REFERENCE])
    found = []
    with jax.transfer_guard("disallow"):
        for step in range(STEPS):
            state = move(step, state)
            state, _ = update(state, source(step, state))
            found.append((state.params, state.copies[REFERENCE]))
            found[-1] = jax.device_get(found[-1])
    for ours, theirs in zip(found, by_hand(every, alpha), strict=True):
        for tree, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(tree["logits"], expected, rtol=2e-5, atol=1e-6)
    assert np.abs(found[-1][1]["logits"] - found[0][1]["logits"]).max() > 0.05


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_a_skipped_update_does_not_move_it(alpha):
    state, _, move = rig(make_mesh(MESHES["data"]), 2, alpha)
    params = jax.tree.map(lambda leaf: leaf + 1, state.params)
    skipped = dataclasses.replace(state.skipped, total=jax.numpy.int32(3), in_a_row=jax.numpy.int32(1))
    before = np.array(state.copies[REFERENCE]["logits"])
    state = move(2, dataclasses.replace(state, params=params, skipped=skipped))
    np.testing.assert_array_equal(state.copies[REFERENCE]["logits"], before)
    made = dataclasses.replace(state.skipped, in_a_row=jax.numpy.int32(0))
    state = move(4, dataclasses.replace(state, skipped=made))
    np.testing.assert_allclose(state.copies[REFERENCE]["logits"], before + alpha, rtol=1e-6)


def test_between_its_moves_and_before_the_first_step_nothing_is_run():
    state, _, move = rig(make_mesh(MESHES["data"]), 3, 0.25)
    assert all(move(step, state) is state for step in (0, 1, 2, 4))


def test_synced_it_is_the_policy_bit_for_bit_in_memory_of_its_own():
    """The update step reuses the buffers of the parameters, so the reference may not share them."""
    state, _, move = rig(make_mesh(MESHES["data"]), 1, 1.0)
    params = jax.tree.map(lambda leaf: leaf * np.float32(np.pi), state.params)
    expected = np.array(params["logits"])
    state = move(1, dataclasses.replace(state, params=params))
    state.params["logits"].delete()
    np.testing.assert_array_equal(state.copies[REFERENCE]["logits"], expected)
