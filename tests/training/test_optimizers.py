"""Optimizers by their first steps."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignment_gap.errors import UserError
from alignment_gap.training import OptimizerConfig, make_optimizer


def steps(config, gradients, start=10.0):
    """The parameter, a pair of equal numbers, after each step."""
    optimizer = make_optimizer(config)
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
    # The norm of (3, 3) is 3 sqrt(2): each becomes 1 / sqrt(2). A norm below 1 stays.
    config = OptimizerConfig("sgd", learning_rate=1.0, clip_norm=1.0)
    np.testing.assert_allclose(steps(config, [3.0, 0.1]), [10 - 0.5**0.5, 9.9 - 0.5**0.5], rtol=1e-6)


def test_warm_up_by_hand():
    # Rates 0, 1/2, 1, 1.
    config = OptimizerConfig("sgd", learning_rate=1.0, warmup_steps=2, clip_norm=None)
    np.testing.assert_allclose(steps(config, [1.0] * 4), [10.0, 9.5, 8.5, 7.5], rtol=1e-6)


def test_adam_starts_with_the_learning_rate():
    config = OptimizerConfig("adamw", learning_rate=0.01, clip_norm=None)
    np.testing.assert_allclose(steps(config, [5.0, 5.0]), [9.99, 9.98], rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "sgd"])
def test_weight_decay_is_per_step_times_the_learning_rate(name):
    config = OptimizerConfig(name, learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    # Without a gradient each step keeps 1 - 0.1 * 0.5 of the parameter.
    np.testing.assert_allclose(steps(config, [0.0, 0.0]), [9.5, 9.025], rtol=1e-5)


def test_weight_decay_warms_up_with_the_learning_rate():
    config = OptimizerConfig("adafactor", learning_rate=0.1, warmup_steps=2, weight_decay=0.5, clip_norm=None)
    np.testing.assert_allclose(steps(config, [0.0] * 3), [10.0, 9.75, 9.2625], rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "sgd"])
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
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)
