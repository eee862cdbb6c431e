"""Estimators and policy gradients equal exact expectations; the tests enumerate every outcome of a small policy."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays_of
from scipy import stats

from alignment_gap import losses

LOGITS = jnp.array([0.3, -0.8, 0.5])
REF_LOGITS = jnp.array([-0.2, 0.4, 0.1])
REWARDS = jnp.array([0.2, 1.0, -0.5])
# P[i, j]: probability that action i beats action j.
PREFERENCES = jnp.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]])


def log_pi(logits):
    return jax.nn.log_softmax(logits)


def kl(logits, ref_logits):
    return jnp.sum(jax.nn.softmax(logits) * (log_pi(logits) - log_pi(ref_logits)))


def expected_over_groups(loss, size, sampler=LOGITS):
    """A function of the logits. Its gradient is the expected gradient over groups of samples of the sampler."""
    groups = jnp.array(list(itertools.product(range(3), repeat=size)))
    weights = jnp.prod(jax.nn.softmax(sampler)[groups], axis=-1)

    def expectation(logits):
        return jnp.sum(weights * loss(log_pi(logits)[groups], groups))

    return expectation


def gradients_agree(ours, exact, scale=1.0):
    np.testing.assert_allclose(jax.grad(ours)(LOGITS), scale * jax.grad(exact)(LOGITS), rtol=1e-4, atol=1e-6)


def regularized_reward(beta):
    return lambda logits: -(jnp.sum(jax.nn.softmax(logits) * REWARDS) - beta * kl(logits, REF_LOGITS))


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("size", [2, 3])
def test_rloo_is_the_gradient_of_the_regularised_reward(size, beta):
    def loss(logps, groups):
        return losses.rloo(logps, REWARDS[groups], log_pi(REF_LOGITS)[groups], beta=beta)

    gradients_agree(expected_over_groups(loss, size), regularized_reward(beta))


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_is_that_gradient_on_another_policys_samples(beta):
    sampler = jnp.array([-0.4, 0.6, 0.0])

    def loss(logps, groups):
        old = log_pi(sampler)[groups]
        return losses.rloo(logps, REWARDS[groups], log_pi(REF_LOGITS)[groups], old, beta=beta)

    gradients_agree(expected_over_groups(loss, 2, sampler), regularized_reward(beta))
    without = expected_over_groups(lambda logps, groups: losses.rloo(logps, REWARDS[groups]), 2, sampler)
    wrong = jax.grad(without)(LOGITS) - jax.grad(regularized_reward(0.0))(LOGITS)
    assert np.abs(wrong).max() > 0.05, "the log-probs under the sampler matter"


@pytest.mark.parametrize("clip", [None, 0.2])
def test_rloo_with_a_ratio_has_the_same_gradient_at_the_sampling_policy(clip):
    logps, reference = log_pi(LOGITS), log_pi(REF_LOGITS)
    ratio = jax.grad(lambda each: losses.rloo(each, REWARDS, reference, logps, beta=0.3, clip=clip))(logps)
    np.testing.assert_allclose(
        ratio, jax.grad(lambda each: losses.rloo(each, REWARDS, reference, beta=0.3))(logps), rtol=1e-6
    )


def test_a_selection_of_the_samples_biases_the_gradient():
    """So jobs refuse to train policy gradients on the best and the worst of the samples."""

    def of_two(logps, groups):
        scores = REWARDS[groups]
        chosen = jnp.stack([jnp.argmax(scores, -1), scores.shape[-1] - 1 - jnp.argmin(scores[:, ::-1], -1)], axis=-1)
        return losses.rloo(*(jnp.take_along_axis(each, chosen, -1) for each in (logps, scores)))

    found = jax.grad(expected_over_groups(of_two, 4))(LOGITS)
    exact = jax.grad(regularized_reward(0.0))(LOGITS)
    # Even its direction is another one.
    cosine = jnp.dot(found, exact) / (jnp.linalg.norm(found) * jnp.linalg.norm(exact))
    assert jnp.linalg.norm(found) > 1.2 * jnp.linalg.norm(exact) and cosine < 0.999


def test_hypo_adds_the_gradient_of_the_kl():
    zero = jnp.zeros(9)

    def loss(logps, groups):
        return losses.hypo(zero, zero, zero, zero, logps, log_pi(REF_LOGITS)[groups], kl_weight=0.3)

    gradients_agree(expected_over_groups(loss, 2), lambda logits: 0.3 * kl(logits, REF_LOGITS))


def test_reinforce_with_the_group_mean_is_smaller_by_the_group():
    def loss(logps, groups):
        return losses.reinforce(logps, REWARDS[groups])

    gradients_agree(expected_over_groups(loss, 3), regularized_reward(0.0), scale=2 / 3)


@pytest.mark.parametrize("baseline", [0.0, -3.0])
def test_reinforce_with_any_fixed_baseline_is_unbiased(baseline):
    def loss(logps, groups):
        return losses.reinforce(logps, REWARDS[groups], log_pi(REF_LOGITS)[groups], baseline=baseline, beta=0.3)

    gradients_agree(expected_over_groups(loss, 1), regularized_reward(0.3))


@pytest.mark.parametrize("mixture", [0.0, 0.4, 1.0])
def test_nash_md_is_the_gradient_against_the_mixture(mixture):
    opponent = jnp.exp(losses.geometric_mixture(LOGITS, REF_LOGITS, mixture=mixture))
    wins = PREFERENCES @ opponent

    def loss(logps, groups):
        return losses.nash_md(logps, log_pi(REF_LOGITS)[groups], wins[groups], beta=0.3)

    def exact(logits):
        return -jnp.dot(jax.nn.softmax(logits), wins) + 0.3 * kl(logits, REF_LOGITS)

    gradients_agree(expected_over_groups(loss, 2), exact)


@pytest.mark.parametrize("mixture", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_a_mixture_with_a_token_that_one_policy_excludes(mixture, side):
    """By numpy: the token has no probability, unless the policy that excludes it has weight 0."""
    pair = [np.array([0.3, -0.8, 0.5], np.float32), np.array([-0.2, 0.4, 0.1], np.float32)]
    pair[side][1] = -np.inf
    weight = np.prod([np.exp(each) ** share for each, share in zip(pair, (1 - mixture, mixture), strict=True)], axis=0)
    found = losses.geometric_mixture(*map(jnp.asarray, pair), mixture=mixture)
    np.testing.assert_allclose(np.exp(found), weight / weight.sum(), rtol=1e-6)

    def value(*logits):
        return jnp.exp(losses.geometric_mixture(*logits, mixture=mixture)) @ REWARDS

    gradients = jax.grad(value, argnums=(0, 1))(*map(jnp.asarray, pair))
    assert np.isfinite(np.stack(gradients)).all()
    # In the other policy, a token that has no probability has no gradient either.
    possible = weight > 0
    mean = (weight / weight.sum()) @ np.asarray(REWARDS)
    slope = np.where(possible, weight / weight.sum() * (np.asarray(REWARDS) - mean), 0.0)
    for gradient, share in zip(gradients, (1 - mixture, mixture), strict=True):
        np.testing.assert_allclose(gradient, share * slope, atol=1e-6)


@pytest.mark.parametrize("name", ["ppo_clip", "dr_grpo", "grpo"])
def test_surrogates_at_the_sampling_policy_are_reinforce(name):
    tokens = log_pi(LOGITS)[:, None]
    mask, scores = jnp.ones((3, 1), bool), REWARDS
    loss = losses.get(name) if name == "ppo_clip" else losses.get(name, beta=0.0)
    gradient = jax.grad(lambda tokens: loss(tokens, scores, mask))
    expected = jax.grad(lambda tokens: losses.reinforce(tokens[:, 0], scores))(tokens)
    scale = 1.0 / (np.std(np.asarray(REWARDS), ddof=1) + 1e-4) if name == "grpo" else 1.0
    np.testing.assert_allclose(gradient(tokens), scale * expected, rtol=1e-5)


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_kl_estimators_in_expectation(estimator, unbiased):
    pi, ref = log_pi(LOGITS), log_pi(REF_LOGITS)
    mean = jnp.sum(jnp.exp(pi) * losses.kl_estimate(pi, ref, estimator=estimator))
    assert np.isclose(mean, kl(LOGITS, REF_LOGITS), rtol=1e-5) == unbiased


def test_gradients_of_the_kl_estimators_are_as_documented():
    ref = log_pi(REF_LOGITS)

    def gradient(estimator):
        def expectation(logits):
            return jnp.sum(jax.nn.softmax(LOGITS) * losses.kl_estimate(log_pi(logits), ref, estimator=estimator))

        return jax.grad(expectation)(LOGITS)

    reverse = jax.grad(kl)(LOGITS, REF_LOGITS)
    forward = jax.grad(lambda logits: kl(REF_LOGITS, logits))(LOGITS)
    np.testing.assert_allclose(gradient("k1"), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(gradient("k2"), reverse, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient("k3"), forward, rtol=1e-4, atol=1e-6)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(x=arrays_of.arrays(np.float32, (2, 3), elements=strategies.floats(-1e4, 1e4, width=32)))
def test_k3_is_never_negative_and_finite(x):
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(losses.kl_estimate(x, x[::-1])))(jnp.asarray(x))
    assert np.isfinite(value) and value >= 0
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_online_kl_has_the_value_and_the_gradient_of_the_kl(size):
    def loss(logps, groups):
        return losses.online_kl(logps, log_pi(REF_LOGITS)[groups])

    ours = expected_over_groups(loss, size)
    np.testing.assert_allclose(ours(LOGITS), kl(LOGITS, REF_LOGITS), rtol=1e-5)
    gradients_agree(ours, lambda logits: kl(logits, REF_LOGITS))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(logits=arrays_of.arrays(np.float32, (2, 4, 5), elements=strategies.floats(-20, 20, width=32)))
def test_categorical_kl_and_entropy_equal_scipy(logits):
    p, q = (np.exp(each - each.max(-1, keepdims=True)) for each in logits.astype(np.float64))
    np.testing.assert_allclose(
        losses.categorical_kl(*jnp.asarray(logits)), stats.entropy(p, q, axis=-1), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(losses.entropy(jnp.asarray(logits[0])), stats.entropy(p, axis=-1), rtol=1e-4, atol=1e-5)


def test_impossible_tokens_are_finite():
    p, q = jnp.array([0.0, -jnp.inf, 0.0]), jnp.array([0.0, -jnp.inf, jnp.log(3.0)])
    # KL((1/2, 1/2) || (1/4, 3/4)) = (log 2 + log(2/3)) / 2 = -log(3/4) / 2
    value, gradient = jax.value_and_grad(losses.categorical_kl)(p, q)
    np.testing.assert_allclose(value, -0.5 * np.log(0.75), rtol=1e-5)
    assert np.all(np.isfinite(gradient))
    value, gradient = jax.value_and_grad(losses.entropy)(p)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.zeros(3), atol=1e-7)


def test_geometric_mixture():
    np.testing.assert_allclose(losses.geometric_mixture(LOGITS, REF_LOGITS, mixture=0.0), log_pi(LOGITS), rtol=1e-5)
    np.testing.assert_allclose(losses.geometric_mixture(LOGITS, REF_LOGITS, mixture=1.0), log_pi(REF_LOGITS), rtol=1e-5)
    half = np.sqrt(jax.nn.softmax(LOGITS) * jax.nn.softmax(REF_LOGITS))
    mixture = np.exp(losses.geometric_mixture(LOGITS, REF_LOGITS, mixture=0.5))
    np.testing.assert_allclose(mixture, half / half.sum(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"mixture must be in \[0, 1\], got 1.5"):
        losses.geometric_mixture(LOGITS, REF_LOGITS, mixture=1.5)


def test_what_is_missing_is_named():
    one, two = jnp.zeros((2, 1)), jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="ref_logps is needed where beta is not 0"):
        losses.rloo(two, two, beta=0.1)
    with pytest.raises(ValueError, match="ref_token_logps is needed where beta is not 0"):
        losses.grpo(two[None], jnp.zeros((1, 2)), jnp.ones((1, 2, 2), bool))
    for name in ("rloo", "rebel"):
        with pytest.raises(ValueError, match="at least 2 responses a prompt are needed here, got 1"):
            losses.get(name)(one, **{"ref_logps": one, "scores": one})
    with pytest.raises(ValueError, match="chosen_lengths is needed here"):
        losses.ipo(*[jnp.zeros(2)] * 4, over_tokens="mean")
    pair = (two, two, jnp.zeros(2), jnp.zeros(2), jnp.ones((2, 2), bool), jnp.ones((2, 2), bool))
    with pytest.raises(ValueError, match='are needed with alignment="sampled"'):
        losses.wpo(*pair, chosen_log_collisions=two, alignment="sampled")
    with pytest.raises(ValueError, match="keep must be between 1 and the 2 responses, got 3"):
        losses.raft(two, two, keep=3)
