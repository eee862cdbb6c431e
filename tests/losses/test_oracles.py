"""Values and gradients of every loss equal those of an independent implementation at float64."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracles import CASES, IDS, POLICY, arrays_for, finite_difference, namespace

from alignment_gap import losses


@pytest.mark.parametrize(("name", "settings", "optional", "oracle"), CASES, ids=IDS)
def test_value_and_gradient_equal_the_oracle(name, settings, optional, oracle):
    loss = losses.get(name, **settings)
    n = namespace(seed=7, batch=(2, 2))
    arrays = arrays_for(loss, n, optional)
    policy = {key: arrays[key] for key in POLICY if key in arrays}
    rest = {key: value for key, value in arrays.items() if key not in policy}

    def total(policy):
        value = loss(**policy, **rest)
        return jnp.sum(value), value

    gradients, value = jax.jit(jax.grad(total, has_aux=True))(policy)
    expected = oracle(n, SimpleNamespace(**vars(n)))
    assert value.dtype == jnp.float32
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)
    assert gradients
    for key, gradient in gradients.items():
        np.testing.assert_allclose(gradient, finite_difference(oracle, n, key), rtol=2e-4, atol=2e-5)


def test_every_registered_loss_has_an_oracle():
    assert set(losses.names()) == {name for name, *_ in CASES} | losses.aliases().keys()


@pytest.mark.parametrize(("name", "settings", "optional", "oracle"), CASES, ids=IDS)
def test_no_batch_at_all(name, settings, optional, oracle):
    loss = losses.get(name, **settings)
    n = namespace(seed=3, batch=())
    expected = oracle(n, n)
    value = loss(**arrays_for(loss, n, optional))
    assert value.shape == expected.shape
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-6)
