"""Names, settings and combinations; what importing the losses loads."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_gap import losses

PAIR = tuple(jnp.array([value]) for value in (-1.0, -4.0, -2.0, -3.0))


def test_get_binds_settings_and_keeps_the_arrays():
    loss = losses.get("ipo", beta=0.5)
    np.testing.assert_array_equal(loss(*PAIR), losses.ipo(*PAIR, beta=0.5))
    arrays = [
        each.name for each in inspect.signature(loss).parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    assert arrays[:4] == ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]


@pytest.mark.parametrize("name", losses.names())
def test_every_name_is_found_and_separates_arrays_from_settings(name):
    parameters = inspect.signature(losses.get(name)).parameters.values()
    settings = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    assert all(each.default is not each.empty for each in settings)
    assert all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters if each not in settings)


def test_aliases_compute_what_they_stand_for():
    lengths = {"chosen_lengths": jnp.array([2]), "rejected_lengths": jnp.array([4])}
    np.testing.assert_array_equal(losses.get("sigmoid")(*PAIR), losses.dpo(*PAIR))
    np.testing.assert_array_equal(losses.get("hinge", beta=0.25)(*PAIR), losses.slic(*PAIR, beta=0.25))
    np.testing.assert_array_equal(losses.get("bco_pair")(*PAIR), losses.bco(*PAIR, shift=0.0))
    expected = losses.dpo(*PAIR, **lengths, over_tokens="mean")
    np.testing.assert_array_equal(losses.get("sigmoid_norm")(*PAIR, **lengths), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.get("dpoo"), r"loss: unknown 'dpoo'; did you mean 'dpo'\? valid: aot, .*wpo$"),
        (
            lambda: losses.get("ipo", bta=1.0),
            r"of ipo: unknown 'bta'; did you mean 'beta'\? valid: beta, over_tokens$",
        ),
        (lambda: losses.get("ipo", chosen_logps=1.0), "setting of ipo: unknown 'chosen_logps'"),
        (lambda: losses.get(losses.ipo, bta=1.0), "setting of ipo: unknown 'bta'"),
        (lambda: losses.gpo(*PAIR, f="hing"), r"f: unknown 'hing'; did you mean 'hinge'\?"),
        (lambda: losses.ipo(*PAIR, over_tokens="average"), "over_tokens: unknown 'average'; valid: sum, mean"),
        (lambda: losses.dpo(*PAIR, label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (lambda: losses.combine(), "at least one"),
        (lambda: losses.token_log_probs(PAIR[0][None], PAIR[0][None], jnp.array([0]), block_size=0), "block_size"),
    ],
)
def test_mistakes_are_answered_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_callable_of_the_users_own():
    def mine(chosen_logps, rejected_logps, *, slope=1.0):
        return slope * (rejected_logps - chosen_logps)

    assert losses.get(mine) is mine
    np.testing.assert_array_equal(losses.get(mine, slope=2.0)(*PAIR[:2]), [-6.0])
    assert losses.get(lambda **arrays: arrays, anything=1)() == {"anything": 1}


def test_combine_adds_and_unites_what_the_losses_name():
    def unlikelihood(rejected_logps):
        return -rejected_logps

    loss = losses.combine((1.0, losses.get("dpo", beta=0.5)), (0.2, "sft"), (2.0, unlikelihood))
    names = list(inspect.signature(loss).parameters)
    assert names[:5] == ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps", "logps"]
    # 0.3132617 + 0.2 * 2.5 + 2 * 4
    value = loss(*PAIR, jnp.array([[-1.0, -4.0]]))
    np.testing.assert_allclose(value, [8.8132617], rtol=1e-6)
    np.testing.assert_array_equal(losses.get(loss)(*PAIR, logps=jnp.array([[-1.0, -4.0]])), value)
    gradient = jax.jit(jax.grad(lambda rejected: loss(PAIR[0], rejected, *PAIR[2:], jnp.zeros((1, 2))).sum()))(PAIR[1])
    # 0.5 * (1 - sigma(1)) - 2
    np.testing.assert_allclose(gradient, [-1.8655293], rtol=1e-6)


def test_combine_nests_with_traced_weights():
    inner = losses.combine((1.0, "dpo"), (1.0, "ipo"))

    def outer(weight):
        return losses.combine((weight, inner), (1.0, "slic"))(*PAIR)[0]

    expected = 0.5 * (losses.dpo(*PAIR) + losses.ipo(*PAIR)) + losses.slic(*PAIR)
    np.testing.assert_allclose(jax.jit(outer)(0.5), expected[0], rtol=1e-6)


def test_a_loss_of_losses_or_around_one_reads_other_prompts_where_that_one_does():
    reads = losses.reads_other_prompts
    of_one = losses.combine((1.0, "dpo"), (0.1, losses.get("bco", shift=0.0)))
    of_others = losses.combine((1.0, of_one), (0.1, losses.get("kto", beta=0.2)))
    assert not reads(of_one) and reads(of_others) and reads(losses.combine((1.0, of_others)))
    assert reads(jax.jit(losses.get("bco", beta=0.2))) and not reads(jax.jit(losses.dpo))

    def mine(logps):
        return logps - logps.mean()

    assert not reads(mine)
    mine.reads_other_prompts = True
    assert reads(mine) and reads(losses.get(mine)) and reads(losses.combine((1.0, mine)))


def test_importing_the_losses_loads_nothing_but_jax_and_chex():
    program = (
        "import sys, jax, jax.numpy, chex, jaxtyping; before = set(sys.modules); from alignment_gap import losses; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "ours = {name for name in sys.modules if name.startswith('alignment_gap.')}; "
        "assert all(name.startswith('alignment_gap.losses') for name in ours), ours; "
        "assert not new & {'flax', 'optax', 'orbax', 'grain', 'tensorflow', 'torch', 'scipy'}, new; print('clean')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "clean\n"
