"""Games that are small enough for exact solutions; gradient descent with the library's losses finds them.

A policy has a few responses. Every pair (y, y') has the weight mu(y) mu(y'). Online, mu is the policy itself, without
gradient; offline, it is a fixed distribution. The label is the soft preference P[y, y'].
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from alignment_gap import losses

TWO = np.array([[0.5, 0.7], [0.3, 0.5]])
CYCLE = np.array([[4.5, 5.0, 4.0], [4.0, 4.5, 5.0], [5.0, 4.0, 4.5]]) / 9


@functools.partial(jax.jit, static_argnames=("loss", "online", "steps"))
def descend(loss, start, preferences, reference, sampler, rate, *, online, steps=3000):
    """The policy after gradient descent on the expected loss."""
    size = len(preferences)
    first, second = (each.reshape(-1) for each in jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij"))

    def objective(logits):
        log_pi, log_ref = jax.nn.log_softmax(logits), jnp.log(reference)
        mu = lax.stop_gradient(jax.nn.softmax(logits)) if online else sampler
        values = loss(log_pi[first], log_pi[second], log_ref[first], log_ref[second], preferences[first, second])
        return jnp.sum(mu[first] * mu[second] * values)

    def step(logits, _):
        return logits - rate * jax.grad(objective)(logits), None

    return jax.nn.softmax(lax.scan(step, start, None, length=steps)[0])


def play(loss, preferences, *, sampler=None, start=None, reference=None, rate=0.5, steps=3000):
    size = len(preferences)
    uniform = np.full(size, 1 / size)
    arrays = (
        np.zeros(size) if start is None else start,
        preferences,
        uniform if reference is None else reference,
        uniform if sampler is None else sampler,
    )
    arrays = [jnp.asarray(array, jnp.float32) for array in arrays]
    return np.asarray(descend(loss, *arrays, rate, online=sampler is None, steps=steps))


def softmax(logits):
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def regularized_nash(preferences, reference, beta):
    """pi = ref exp(P pi / beta), normalised; found by damped iteration at float64."""
    policy = reference
    for _ in range(20_000):
        best = softmax(np.log(reference) + preferences @ policy / beta)
        policy = policy**0.95 * best**0.05
        policy /= policy.sum()
    np.testing.assert_allclose(policy, softmax(np.log(reference) + preferences @ policy / beta), atol=1e-12)
    return policy


def random_game(seed, size=4):
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.uniform(0.05, 0.95, (size, size)), 1)
    return upper + np.tril(1 - upper.T, -1) + 0.5 * np.eye(size), rng.dirichlet(np.full(size, 5.0))


@pytest.mark.parametrize(("beta", "expected"), [(1.0, 0.549834), (0.1, 0.880797)])
@pytest.mark.parametrize("sampler", [None, (0.5, 0.5), (0.9, 0.1)], ids=str)
def test_two_actions(beta, expected, sampler):
    """pi_1 / pi_2 = exp((2 p - 1) / (2 beta)), online and offline, for any sampler."""
    policy = play(losses.get("ipo", beta=beta), TWO, sampler=sampler)
    np.testing.assert_allclose(policy[0], expected, atol=2e-6)


@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0), (2.0, 0.0, -1.0), (-1.0, 3.0, 0.0)], ids=str)
def test_three_cycle_online_is_uniform_from_any_start(start):
    policy = play(losses.get("ipo", beta=0.1), CYCLE, start=np.array(start), steps=6000)
    np.testing.assert_allclose(policy, np.full(3, 1 / 3), atol=1e-5)


def test_three_cycle_offline_depends_on_the_sampler():
    # P mu = (46, 42.5, 46.5) / 90; exp(10 P mu) is proportional to (exp(-1/18), exp(-4/9), 1)
    # = (0.9459594, 0.6411804, 1), of sum 2.5871398.
    policy = play(losses.get("ipo", beta=0.1), CYCLE, sampler=(0.6, 0.3, 0.1), rate=1.0, steps=6000)
    np.testing.assert_allclose(policy, [0.365639, 0.247834, 0.386527], atol=2e-6)


@pytest.mark.parametrize("name", ["ipo", "ipo_md"])
@pytest.mark.parametrize("seed", [0, 1])
def test_online_ipo_is_the_nash_equilibrium(name, seed):
    preferences, reference = random_game(seed)
    policy = play(losses.get(name, beta=0.3), preferences, reference=reference, steps=6000)
    np.testing.assert_allclose(policy, regularized_nash(preferences, reference, 0.3), atol=2e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_online_dpo_is_not_the_nash_equilibrium(seed):
    preferences, reference = random_game(seed)
    nash = regularized_nash(preferences, reference, 0.3)
    loss = losses.get("dpo", beta=0.3)
    settled = play(loss, preferences, reference=reference, rate=10.0, steps=10_000)
    later = play(loss, preferences, reference=reference, rate=10.0, steps=12_000)
    np.testing.assert_allclose(settled, later, atol=1e-5)
    assert np.abs(settled - nash).max() > 0.02


@pytest.mark.parametrize("seed", [0, 1])
def test_offline_ipo_has_its_closed_form(seed):
    """pi = ref exp(P mu / beta), normalised."""
    preferences, reference = random_game(seed)
    sampler = np.random.default_rng(seed).dirichlet(np.full(4, 5.0))
    policy = play(losses.get("ipo", beta=0.5), preferences, sampler=sampler, reference=reference, rate=1.0, steps=6000)
    np.testing.assert_allclose(policy, softmax(np.log(reference) + preferences @ sampler / 0.5), atol=1e-5)


@pytest.mark.parametrize("sampler", [(0.25, 0.25, 0.25, 0.25), (0.5, 0.2, 0.2, 0.1)], ids=str)
def test_offline_dpo_recovers_bradley_terry_rewards(sampler):
    """If P = sigma(r_i - r_j), pi = ref exp(r / beta), normalised, for any sampler."""
    rewards = np.array([0.4, -0.3, 0.1, 0.0])
    preferences = 1 / (1 + np.exp(rewards[None] - rewards[:, None]))
    reference = random_game(0)[1]
    policy = play(
        losses.get("dpo", beta=0.5), preferences, sampler=sampler, reference=reference, rate=20.0, steps=10_000
    )
    np.testing.assert_allclose(policy, softmax(np.log(reference) + rewards / 0.5), atol=1e-5)


def test_offline_dpo_of_two_actions():
    """beta h = logit p: at beta = 1 and a uniform reference pi_1 = p."""
    policy = play(losses.get("dpo", beta=1.0), TWO, sampler=(0.5, 0.5), rate=5.0)
    np.testing.assert_allclose(policy[0], 0.7, atol=2e-6)
