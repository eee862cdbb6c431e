"""The guard skips updates that would ruin the parameters, in a real update step; other updates do not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import MESHES, Unigram, make_batch

from alignment_gap import losses
from alignment_gap.errors import UserError
from alignment_gap.sharding import batch_sharding, make_mesh
from alignment_gap.training import (
    Checkpoints,
    GuardConfig,
    abstract_state,
    create_state,
    make_update_step,
    policy_objective,
)
from alignment_gap.training import guard as guarding

BATCH = make_batch(8)
UNIGRAM = Unigram(16)
OPTIMIZER = optax.adamw(0.1)


def loss(chosen_logps, scores):
    """If the first score of a prompt is 0, the loss is infinite and so is its gradient."""
    return -chosen_logps * jnp.log(scores[:, 0])


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MESHES["data"])


@pytest.fixture(scope="module")
def abstract(mesh):
    return abstract_state(UNIGRAM.init, OPTIMIZER, mesh)


@pytest.fixture(scope="module")
def step_of(mesh, abstract):
    """The update step with a guard."""
    objective = policy_objective(UNIGRAM, loss)
    return lambda config: make_update_step(objective, OPTIMIZER, mesh, abstract, skip=config)


@pytest.fixture(scope="module")
def update(step_of):
    return step_of(GuardConfig())


def start(abstract):
    return create_state(UNIGRAM.init, abstract, OPTIMIZER, jax.random.key(0))


def batch_of(mesh, score):
    """A batch with this score for the first prompt."""
    scores = np.full((8, 2), 0.5, np.float32)
    scores[0] = score
    return jax.device_put(dataclasses.replace(BATCH, scores=scores), batch_sharding(mesh))


def copied(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("score", [0.0, np.nan, -1.0])
def test_an_update_that_is_not_finite_is_skipped_and_counted(score, update, abstract, mesh):
    state, metrics = update(start(abstract), batch_of(mesh, 0.5))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (0, 0)
    before = copied((state.params, state.optimizer_state))
    for number in (1, 2):
        state, metrics = update(state, batch_of(mesh, score))
        assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (number, number)
        assert not np.isfinite(metrics["loss"])
    assert_same(copied((state.params, state.optimizer_state)), before)
    assert int(state.step) == 3
    # Training continues as if there had been no bad batches.
    state, metrics = update(state, batch_of(mesh, 0.25))
    assert (int(metrics["skipped"]), int(metrics["skipped_in_a_row"])) == (2, 0)
    healthy, _ = update(start(abstract), batch_of(mesh, 0.5))
    healthy, _ = update(healthy, batch_of(mesh, 0.25))
    assert_same(copied(state.params), copied(healthy.params))


@pytest.mark.parametrize("name", ["best_of_n", "kto", "ipo"])
def test_no_loss_trains_on_prompts_without_scores(name, abstract, mesh):
    """Even a loss that ignores scores, or that reads only which of three responses has the highest."""
    responses = np.repeat(np.asarray(BATCH.responses)[:, :1], 3, axis=1)
    lengths, scores = np.repeat(np.asarray(BATCH.response_lengths)[:, :1], 3, axis=1), np.full((8, 3), 0.5, np.float32)
    batch = dataclasses.replace(
        BATCH,
        responses=responses,
        response_lengths=lengths,
        reference_log_probs=np.zeros(responses.shape, np.float32),
    )
    update = make_update_step(policy_objective(UNIGRAM, losses.get(name)), OPTIMIZER, mesh, abstract)
    for value, skipped in ((0.5, 0), (np.nan, 1)):
        scored = dataclasses.replace(batch, scores=np.full_like(scores, value))
        state, metrics = update(start(abstract), jax.device_put(scored, batch_sharding(mesh)))
        assert int(metrics["skipped"]) == skipped
    assert_same(copied(state.params), copied(start(abstract).params))


def test_a_healthy_step_is_the_same_without_the_guard(update, abstract, mesh, monkeypatch, step_of):
    """Up to the last bit: with the guard, XLA does not fuse the last multiplication and addition."""
    monkeypatch.setattr("alignment_gap.training.update.guard", lambda config, skipped, *_: (jnp.bool_(True), skipped))
    unguarded = step_of(GuardConfig())
    first, second = (copied(step(start(abstract), batch_of(mesh, 0.25))[0].params) for step in (update, unguarded))
    np.testing.assert_array_max_ulp(first["logits"], second["logits"], maxulp=1)


def test_a_spike_is_skipped_once_the_norm_is_known(monkeypatch):
    """Norms of 1 have the mean 1. A norm of 5 is allowed, one of 5.1 is not, and does not change the mean."""
    monkeypatch.setattr(guarding, "_LEARNED", 3)
    config, skipped = GuardConfig(spike=5.0), guarding.nothing_skipped()

    def step(number, norm, memory):
        return guarding.guard(config, memory, jnp.int32(number), jnp.float32(1), jnp.float32(norm))

    made, memory = step(0, 9.0, skipped)
    assert made  # The mean is not known yet.
    np.testing.assert_allclose(memory.norm, 9.0)
    for number in range(3):
        made, skipped = step(number, 1.0, skipped)
        assert made
    np.testing.assert_allclose(skipped.norm, 1.0, rtol=1e-6)
    made, after = step(3, 5.1, skipped)
    assert not made and (int(after.total), int(after.in_a_row)) == (1, 1)
    np.testing.assert_array_equal(after.norm, skipped.norm)
    made, after = step(4, 5.0, after)
    assert made and (int(after.total), int(after.in_a_row)) == (1, 0)
    np.testing.assert_allclose(after.norm, 0.75 + 0.25 * 5, rtol=1e-6)  # This is the fourth norm of the mean.


def test_updates_without_a_gradient_do_not_count_as_norms():
    """Sixty of them come first, then two of three; each third update has a gradient of norm 1, and one has a spike."""
    config, memory, made = GuardConfig(spike=10.0), guarding.nothing_skipped(), []
    guarded = jax.jit(functools.partial(guarding.guard, config))
    for number in range(300):
        norm = 0.0 if number < 60 or number % 3 else 1.0 if number != 270 else 10.1
        is_made, memory = guarded(memory, jnp.int32(number), jnp.float32(0.1), jnp.float32(norm))
        made.append(bool(is_made))
    assert [number for number, each in enumerate(made) if not each] == [270]
    np.testing.assert_allclose(memory.norm, 1.0, rtol=1e-6)
    assert int(memory.norms) == 79


def test_a_mean_of_zero_is_no_limit(monkeypatch):
    """As in a checkpoint of an earlier version whose updates had no gradient."""
    memory = guarding.Skipped(jnp.int32(0), jnp.int32(0), jnp.float32(0), jnp.int32(99))
    assert guarding.guard(GuardConfig(spike=2.0), memory, jnp.int32(99), jnp.float32(1), jnp.float32(1))[0]


@pytest.mark.parametrize("counted", [True, False])
def test_a_checkpoint_of_an_earlier_version_goes_on(counted, update, abstract, mesh, tmp_path):
    """Which counted no norms; all of its updates that were made count."""
    state = start(abstract)
    for score in (0.5, 0.0, 0.25):
        state, _ = update(state, batch_of(mesh, score))
    stored = state if counted else dataclasses.replace(state, skipped=dataclasses.replace(state.skipped, norms=None))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(stored)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(abstract, 3)
    assert_same(copied(restored), copied(state))
    assert int(restored.skipped.norms) == 2
    again, _ = update(restored, batch_of(mesh, 0.25))
    assert int(again.skipped.norms) == 3


@pytest.mark.parametrize("settings", [{"stop_after": 0}, {"spike": 1.0}, {"spike": float("nan")}])
def test_settings_out_of_range(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        GuardConfig(**settings)


def test_the_line_of_a_stop_says_what_was_met():
    config = GuardConfig(stop_after=2)
    guarding.check_progress(config, 1, 9, float("nan"), 1.0)
    with pytest.raises(UserError, match="the last 2 updates up to step 9 were skipped, the loss is nan: lower"):
        guarding.check_progress(config, 2, 9, float("nan"), 1.0)
    with pytest.raises(UserError, match=r"the gradient norm is 1\.23e\+03: lower"):
        guarding.check_progress(config, 2, 9, 0.5, 1234.0)
