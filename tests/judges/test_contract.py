"""Features that all judges share: their names, their facts, and win fractions."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignment_gap.errors import UserError
from alignment_gap.judges import JudgeConfig, is_model, open_judge
from alignment_gap.judges.contract import shares_of_wins


def test_shares_of_wins_by_hand():
    """For two responses, four different ones, four with ties, and three equal ones."""
    np.testing.assert_array_equal(shares_of_wins(jnp.array([[0.3, 0.1], [2.0, 2.0]])), [[1.0, 0.0], [0.5, 0.5]])
    found = shares_of_wins(jnp.array([[-1.0, 5.0, 0.0, 3.0], [1.0, 2.0, 2.0, 0.0]]))
    # Second row: 1 beats one of three. Each 2 beats two and ties with the other 2.
    np.testing.assert_allclose(found, [[0, 1, 1 / 3, 2 / 3], [1 / 3, 2.5 / 3, 2.5 / 3, 0]], rtol=1e-6)
    np.testing.assert_array_equal(shares_of_wins(jnp.zeros((1, 3))), [[0.5] * 3])


def test_shares_of_wins_depend_on_the_order_of_rewards_alone():
    rewards = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    shares = shares_of_wins(rewards)
    np.testing.assert_array_equal(shares_of_wins(jnp.exp(3 * rewards)), shares)
    np.testing.assert_allclose(shares_of_wins(-rewards), 1 - shares, atol=1e-6)
    np.testing.assert_allclose(shares.sum(axis=1), 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("rubric", False),
        ("my_package.judges:brevity", False),
        ("runs/golden", True),
        ("golden", True),
        # A URL or a path may have a colon; it is still a folder.
        ("gs://bucket/golden", True),
        ("./odd:name", True),
        ("runs/rubric", True),
    ],
)
def test_a_name_says_what_kind_of_judge_it_is(name, model):
    assert is_model(name) == model


def test_no_name_is_no_judge(posts, mesh):
    with pytest.raises(UserError, match="no judge is set: give the folder of a preference model, rubric, modul"):
        open_judge(JudgeConfig(), posts, mesh)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "reward"}, "labels is 'reward': did you mean rewards"),
        ({"labels": "probabilities"}, "labels is 'probabilities': choose one of hard, soft, rewards"),
        ({"step": -1}, "step is -1: it must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        JudgeConfig("rubric", **settings)
