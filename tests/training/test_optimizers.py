"""Optimizers by their first steps by hand, and schedules by hand."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment_gap.errors import UserError
from alignment_gap.sharding import unbox
from alignment_gap.training import OptimizerConfig, make_optimizer, make_schedule


def boxed(value, *names):
    return nn.LogicallyPartitioned(value, names)


def steps(config, gradients, start=10.0, length=None):
    """The parameter (two equal numbers) after each step."""
    optimizer = make_optimizer(config, steps=length, parameters={"w": boxed(np.zeros(2), "embed")})
    params = {"w": jnp.full(2, start)}
    state, seen = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update({"w": jnp.full(2, gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(params["w"][0]))
    return seen


def test_sgd_by_hand():
    config = OptimizerConfig("sgd", learning_rate=0.1, clip_norm=None)
    np.testing.assert_allclose(steps(config, [1.0, -2.0]), [9.9, 10.1], rtol=1e-6)


def test_clipping_by_hand():
    # The norm of (3, 3) is 3 sqrt(2), so each number becomes 1 / sqrt(2). A norm below 1 does not change.
    config = OptimizerConfig("sgd", learning_rate=1.0, clip_norm=1.0)
    np.testing.assert_allclose(steps(config, [3.0, 0.1]), [10 - 0.5**0.5, 9.9 - 0.5**0.5], rtol=1e-6)


def test_warm_up_by_hand():
    # The rates are 0, 1/2, 1, 1.
    config = OptimizerConfig("sgd", learning_rate=1.0, warmup_steps=2, clip_norm=None)
    np.testing.assert_allclose(steps(config, [1.0] * 4), [10.0, 9.5, 8.5, 7.5], rtol=1e-6)


def test_adam_starts_with_the_learning_rate():
    config = OptimizerConfig("adamw", learning_rate=0.01, clip_norm=None)
    np.testing.assert_allclose(steps(config, [5.0, 5.0]), [9.99, 9.98], rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion", "muon", "sgd"])
def test_weight_decay_is_per_step_times_the_learning_rate(name):
    config = OptimizerConfig(name, learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    # Without a gradient, each step multiplies the parameter by 1 - 0.1 * 0.5.
    np.testing.assert_allclose(steps(config, [0.0, 0.0]), [9.5, 9.025], rtol=1e-5)


def test_weight_decay_warms_up_with_the_learning_rate():
    config = OptimizerConfig("adafactor", learning_rate=0.1, warmup_steps=2, weight_decay=0.5, clip_norm=None)
    np.testing.assert_allclose(steps(config, [0.0] * 3), [10.0, 9.75, 9.2625], rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion", "muon", "sgd"])
def test_every_optimizer_goes_downhill(name):
    assert steps(OptimizerConfig(name, learning_rate=0.1), [1.0] * 3)[-1] < 10.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adam"}, "name is 'adam': did you mean adamw?"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be above 0"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0: it must be above 0 and finite"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"schedule": "cosin"}, "schedule is 'cosin': did you mean cosine?"),
        ({"final_rate": 1.5}, "final_rate is 1.5: it must be from 0 to 1"),
        ({"decay_share": 0.0}, "decay_share is 0.0: it must be above 0"),
        ({"name": "sgd", "moment_dtype": "bfloat16"}, "sgd keeps no first moment: leave it out"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)


# Schedules by hand: ten steps; two of them warm up.


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({}, [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [0, 0.5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0]),
        ({"schedule": "linear", "final_rate": 0.2}, [0, 0.5, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]),
        ({"schedule": "cosine"}, [0, 0.5, *((1 + np.cos(np.pi * np.arange(9) / 8)) / 2)]),
        ({"schedule": "inverse_square_root"}, [0, 0.5, *np.sqrt(2 / np.arange(2, 11))]),
        ({"schedule": "warmup_stable_decay", "decay_share": 0.4}, [0, 0.5, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
    ],
)
def test_schedules_by_hand(settings, rates):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=2, **settings), 10)
    np.testing.assert_allclose([schedule(step) for step in range(11)], rates, atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "inverse_square_root", "warmup_stable_decay"])
def test_a_schedule_without_warm_up_starts_at_the_learning_rate_and_falls(name):
    schedule = make_schedule(OptimizerConfig(learning_rate=0.5, schedule=name), 10)
    rates = [float(schedule(step)) for step in range(11)]
    assert rates[0] == 0.5 and sorted(rates, reverse=True) == rates and rates[-1] < 0.5


def test_updates_follow_the_schedule():
    config = OptimizerConfig("sgd", learning_rate=1.0, schedule="linear", clip_norm=None)
    np.testing.assert_allclose(steps(config, [1.0] * 4, length=4), [9.0, 8.25, 7.75, 7.5], rtol=1e-6)


def test_a_run_that_ends_in_its_warm_up_cannot_decay():
    with pytest.raises(UserError, match=r"warmup_steps is 10, but the run has 10 steps: schedule=cosine .* lower it"):
        make_schedule(OptimizerConfig(schedule="cosine", warmup_steps=10), 10)


# The parameters that are decayed, the parameters for Muon, and moments.

PARAMETERS = {
    "bias": np.ones(3, np.float32),
    "kernel": np.ones((2, 3, 4), np.float32),
    "out": np.ones((2, 2, 2, 3), np.float32),
    "scale": np.ones((2, 3), np.float32),
    "table": np.ones((5, 3), np.float32),
}
AXES = {
    "bias": ("embed",),
    "kernel": ("layers", "embed", "mlp"),
    "out": ("layers", "heads", "kv", "embed"),
    "scale": ("layers", "embed"),
    "table": ("vocab", "embed"),
}
BOXED = {name: boxed(value, *AXES[name]) for name, value in PARAMETERS.items()}


def update_of(config, gradients):
    optimizer = make_optimizer(config, parameters=BOXED)
    # A state is made like this: from boxed parameters, which are then unboxed.
    state = jax.tree.map(jnp.asarray, unbox(optimizer.init(BOXED)))
    with jax.numpy_dtype_promotion("standard"):  # optax needs this promotion.
        updates, _ = optimizer.update(gradients, state, PARAMETERS)
    return updates


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion", "muon", "sgd"])
def test_matrices_alone_are_decayed_where_that_is_asked_for(name):
    config = OptimizerConfig(name, learning_rate=0.1, weight_decay=0.5, decayed="matrices", clip_norm=None)
    updates = update_of(config, jax.tree.map(np.zeros_like, PARAMETERS))
    for parameter, update in updates.items():
        wanted = -0.05 if parameter in ("kernel", "out", "table") else 0.0
        np.testing.assert_allclose(update, np.full_like(PARAMETERS[parameter], wanted), atol=1e-7)


def test_muon_orthogonalises_the_matrix_of_each_layer_and_leaves_the_rest_to_adamw():
    rng = np.random.default_rng(0)
    gradients = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in PARAMETERS.items()}
    updates = update_of(OptimizerConfig("muon", learning_rate=0.1, clip_norm=None), gradients)
    nesterov = optax.adamw(0.1, weight_decay=0.0, nesterov=True)
    adamw, _ = nesterov.update(gradients, nesterov.init(PARAMETERS), PARAMETERS)
    for name in ("bias", "scale", "table"):
        np.testing.assert_allclose(updates[name], adamw[name], rtol=1e-5)
    for name, rows in (("kernel", 3), ("out", 4)):
        for layer, gradient in zip(updates[name], gradients[name], strict=True):
            update, gradient = np.reshape(layer, (rows, -1)), gradient.reshape(rows, -1)
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            # Five Newton-Schulz steps give singular values of about 1, between 0.5 and 1.5 (2502.16982, 2.1).
            singular = np.diag(left.T @ update @ right.T) / (-0.1 * 0.2 * np.sqrt(max(update.shape)))
            assert ((singular > 0.5) & (singular < 1.5)).all()
            np.testing.assert_allclose(left @ left.T @ update @ right.T @ right, update, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_first_moments_in_bfloat16_take_half_of_the_memory_and_give_nearly_the_same_step(name):
    rng = np.random.default_rng(1)
    gradients = {key: rng.normal(size=value.shape).astype(np.float32) for key, value in PARAMETERS.items()}
    full = OptimizerConfig(name, learning_rate=0.1, clip_norm=None)
    half = dataclasses.replace(full, moment_dtype="bfloat16")
    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(make_optimizer(each, parameters=BOXED).init(PARAMETERS)))
        for each in (full, half)
    ]
    assert sizes[0] - sizes[1] == sum(value.size for value in PARAMETERS.values()) * 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), update_of(full, gradients), update_of(half, gradients)
    )


def test_lion_by_hand():
    # The first step has the sign of 0.9 m + 0.1 g = 0.1. Then m = 0.99 m + 0.01 g = 0.01, and 0.009 - 0.1 has the other
    # sign.
    config = OptimizerConfig("lion", learning_rate=0.1, clip_norm=None)
    np.testing.assert_allclose(steps(config, [1.0, -1.0]), [9.9, 10.0], rtol=1e-6)
