"""Names, settings and combinations of losses, and the modules that importing the losses loads."""

import functools
import inspect
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_oracles import arrays_for, namespace

from alignment_gap import losses
from alignment_gap.losses._pairwise import CURVES
from alignment_gap.losses._registry import register

PAIR = tuple(jnp.array([value]) for value in (-1.0, -4.0, -2.0, -3.0))


def arrays_of(loss):
    """The names of the arrays that a loss takes."""
    parameters = inspect.signature(loss).parameters.values()
    return [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]


def test_get_binds_settings_and_keeps_the_arrays():
    loss = losses.get("ipo", beta=0.5)
    np.testing.assert_array_equal(loss(*PAIR), losses.ipo(*PAIR, beta=0.5))
    assert arrays_of(loss)[:4] == ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]


@pytest.mark.parametrize("name", losses.names())
def test_every_name_is_found_and_separates_arrays_from_settings(name):
    parameters = inspect.signature(losses.get(name)).parameters.values()
    settings = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    assert all(each.default is not each.empty for each in settings)
    assert all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters if each not in settings)


def test_losses_are_registered_under_their_own_names_and_aliases_stand_for_them():
    for name in losses.names():
        assert name in losses.aliases() or losses.get(name) is getattr(losses, name)
    for name, (loss, settings) in losses.aliases().items():
        stated, meant = losses.get(name), losses.get(loss, **settings)
        assert (stated is meant) if not settings else (stated.func is meant.func and stated.keywords == meant.keywords)


def test_aliases_compute_what_they_stand_for():
    lengths = {"chosen_lengths": jnp.array([2]), "rejected_lengths": jnp.array([4])}
    np.testing.assert_array_equal(losses.get("sigmoid")(*PAIR), losses.dpo(*PAIR))
    np.testing.assert_array_equal(losses.get("hinge", beta=0.25)(*PAIR), losses.slic(*PAIR, beta=0.25))
    np.testing.assert_array_equal(losses.get("bco_pair")(*PAIR), losses.bco(*PAIR, shift=0.0))
    expected = losses.dpo(*PAIR, **lengths, over_tokens="mean")
    np.testing.assert_array_equal(losses.get("sigmoid_norm")(*PAIR, **lengths), expected)


@pytest.mark.usefixtures("unchecked")
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
        (lambda: losses.combine("dpo"), r"combine takes pairs \(weight, loss\), one after the other, got 'dpo'"),
        (lambda: losses.combine([(1.0, "dpo"), (0.5, "ipo"), (0.5, "slic")]), "one after the other"),
        (lambda: losses.get(None), "loss is None: give a name"),
        (lambda: losses.reads(3), "loss is 3: give a name"),
        (lambda: losses.reads("ktoo"), "loss: unknown 'ktoo'; did you mean 'kto'"),
        (lambda: losses.arrays(None), "loss is None: give a name"),
        (lambda: losses.get("dpo", over_tokens="mena"), "over_tokens: unknown 'mena'; did you mean 'mean'"),
        (lambda: losses.get("gpo", f="hing"), "f: unknown 'hing'; did you mean 'hinge'"),
        (lambda: losses.get("f_dpo", divergence="alph"), "divergence: unknown 'alph'; did you mean 'alpha'"),
        (lambda: losses.get("grpo", over_tokens="grup"), "over_tokens: unknown 'grup'; did you mean 'group'"),
        (lambda: losses.combine((1.0, "dpo"), ("x", "sft")), "combine: a weight must be a finite number, got 'x'"),
        (lambda: losses.combine((math.nan, "dpo")), "combine: a weight must be a finite number, got nan"),
        (lambda: losses.combine((None, "dpo")), "combine: a weight must be a finite number, got None"),
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


def test_combined_losses_have_one_shape():
    both = losses.combine((1.0, lambda logps: logps), (1.0, lambda logps: logps.mean(-1)))
    with pytest.raises(AssertionError):
        both(jnp.zeros((3, 2)))


def test_combine_nests_with_traced_weights():
    inner = losses.combine((1.0, "dpo"), (1.0, "ipo"))

    def outer(weight):
        return losses.combine((weight, inner), (1.0, "slic"))(*PAIR)[0]

    expected = 0.5 * (losses.dpo(*PAIR) + losses.ipo(*PAIR)) + losses.slic(*PAIR)
    np.testing.assert_allclose(jax.jit(outer)(0.5), expected[0], rtol=1e-6)


READS = {
    "aot": {losses.OTHER_PROMPTS},
    "aot_unpaired": {losses.OTHER_PROMPTS},
    "bco": {losses.OTHER_PROMPTS},
    "dapo": {losses.SAMPLER_LOG_PROBS},
    "dr_grpo": {losses.SAMPLER_LOG_PROBS, losses.WIDTH},
    "grpo": {losses.SAMPLER_LOG_PROBS},
    "hypo": {losses.OWN_SAMPLES},
    "kto": {losses.OTHER_PROMPTS, losses.PROBABILITIES},
    "nash_md": {losses.OWN_SAMPLES, losses.PROBABILITIES},
    "online_kl": {losses.OWN_SAMPLES},
    "ppo_clip": {losses.SAMPLER_LOG_PROBS},
    "reinforce": {losses.OWN_SAMPLES},
    "rloo": {losses.SAMPLER_LOG_PROBS},
}


def test_losses_say_what_they_read():
    said = {name: losses.reads(losses.get(name)) for name in losses.names()}
    assert {name: reads for name, reads in said.items() if reads} == READS


def test_what_a_loss_reads_follows_from_its_settings():
    assert losses.reads(losses.get("bco", shift=0.5)) == set()
    assert losses.reads(losses.get("bco_pair", shift="batch_mean")) == {losses.OTHER_PROMPTS}
    assert losses.reads(losses.get("dr_grpo", max_length=7)) == {losses.SAMPLER_LOG_PROBS}
    assert losses.reads(losses.get("wpo", alignment="sampled")) == {losses.LOG_COLLISIONS}


def test_a_name_stands_for_its_loss():
    for name in losses.names():
        assert losses.reads(name) == losses.reads(losses.get(name))
        assert losses.arrays(name) == losses.arrays(losses.get(name))


def test_every_choice_of_a_loss_can_be_built_and_called():
    assert losses.get("gpo", f=jnp.square).keywords == {"f": jnp.square}
    for f in CURVES:
        losses.get("gpo", f=f)(*PAIR)
    for name, setting, choices in (
        ("dpo", "smoothing", ("conservative", "robust")),
        ("f_dpo", "divergence", ("reverse_kl", "forward_kl", "jensen_shannon", "alpha")),
        ("bco", "shift", ("batch_mean",)),
    ):
        for choice in choices:
            losses.get(name, **{setting: choice})(*PAIR)


def test_a_wrapped_loss_reads_what_the_loss_reads():
    reads, shifted = losses.reads, losses.get("bco", shift=0.0)
    assert reads(jax.jit(losses.bco)) == reads(jax.jit(losses.get("bco", beta=0.2))) == {losses.OTHER_PROMPTS}
    assert reads(losses.get(jax.jit(losses.bco), shift=0.0)) == reads(jax.jit(shifted)) == set()
    assert reads(functools.update_wrapper(shifted, losses.bco)) == set()


def test_combine_reads_what_its_terms_read():
    inner = losses.combine((1.0, "dpo"), (0.1, "online_kl"), (0.1, losses.get("bco", shift=0.0)))
    outer = losses.combine((1.0, inner), (0.1, losses.get("kto", beta=0.2)))
    assert losses.reads(inner) == losses.reads(losses.combine((1.0, inner))) == {losses.OWN_SAMPLES}
    assert losses.reads(outer) == {losses.OWN_SAMPLES, losses.OTHER_PROMPTS, losses.PROBABILITIES}


def test_a_loss_of_ones_own_says_what_it_reads_by_an_attribute():
    def mine(logps, *, power=1):
        return (logps - logps.mean()) ** power

    assert losses.reads(mine) == set()
    mine.reads = [losses.OTHER_PROMPTS]
    for loss in (mine, losses.get(mine, power=2), jax.jit(mine), losses.combine((1.0, mine))):
        assert losses.reads(loss) == {losses.OTHER_PROMPTS}
    mine.reads = lambda settings: [losses.WIDTH] * settings["power"]
    assert losses.reads(mine) == {losses.WIDTH}
    assert losses.reads(losses.get(mine, power=0)) == set()
    mine.reads = losses.WIDTH
    with pytest.raises(ValueError, match=r"reads is 'width': give a collection, such as \('width',\)"):
        losses.reads(mine)
    mine.reads = ["widths"]
    with pytest.raises(ValueError, match="reads: unknown 'widths'; did you mean 'width'"):
        losses.reads(mine)


# `training.loss_inputs` provides these.
OFFERED = {
    *("token_logps", "mask", "logps", "scores", "lengths", "preference"),
    *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("logps", "lengths", "token_logps", "mask")),
    *("chosen_log_collisions", "rejected_log_collisions"),
    *("ref_token_logps", "ref_logps", "ref_chosen_logps", "ref_rejected_logps"),
    *("ref_chosen_token_logps", "ref_rejected_token_logps"),
    *("old_token_logps", "old_logps", "kl_logps", "ref_kl_logps", "fresh_logps", "ref_fresh_logps"),
}


def test_every_array_that_a_loss_names_is_offered():
    named = {array for name in losses.names() for array in arrays_of(losses.get(name))}
    assert named - OFFERED == set()


def test_a_loss_with_a_ratio_takes_the_samplers_log_probs():
    for name in losses.names():
        loss = losses.get(name)
        takes = bool(set(arrays_of(loss)) & {"old_logps", "old_token_logps"})
        assert takes == (losses.SAMPLER_LOG_PROBS in losses.reads(loss)), name


def test_a_loss_divides_by_the_width_where_it_says_so():
    for name in losses.names():
        loss = losses.get(name)
        arrays = arrays_for(loss, namespace(seed=8), ("chosen_lengths", "rejected_lengths", "ref_token_logps"))
        wide = [each for each in arrays if "token_logps" in each or "mask" in each]
        wider = arrays | {each: jnp.pad(arrays[each], [(0, 0)] * (arrays[each].ndim - 1) + [(0, 3)]) for each in wide}
        same = np.allclose(loss(**arrays), loss(**wider), rtol=1e-6)
        assert same == (losses.WIDTH not in losses.reads(loss)), name


def test_two_losses_cannot_have_one_name():
    def ipo(logps):
        return logps

    with pytest.raises(ValueError, match="two losses are named 'ipo'"):
        register()(ipo)
    with pytest.raises(ValueError, match="two losses are named 'hinge'"):
        register(aliases={"hinge": {}})(lambda logps: logps)


@pytest.fixture
def module_of_ones_own(tmp_path, monkeypatch):
    """Adds a module to the path: `some_package.some_losses`."""
    (tmp_path / "some_package").mkdir()
    (tmp_path / "some_package" / "__init__.py").touch()
    source = """
def margin(chosen_logps, rejected_logps, *, slope=1.0):
    return slope * (rejected_logps - chosen_logps)


margin.reads = ("own samples",)
number = 3
"""
    (tmp_path / "some_package" / "some_losses.py").write_text(source)
    (tmp_path / "some_package" / "broken.py").write_text("import some_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_package.some_losses"
    for name in [name for name in sys.modules if name.startswith("some_package")]:
        del sys.modules[name]


def test_module_and_function_work_as_a_name(module_of_ones_own):
    name = f"{module_of_ones_own}:margin"
    loss = losses.get(name, slope=2.0)
    np.testing.assert_array_equal(loss(*PAIR[:2]), [-6.0])
    assert losses.reads(loss) == {losses.OWN_SAMPLES}
    np.testing.assert_array_equal(losses.combine((1.0, "dpo"), (0.5, name))(*PAIR), losses.dpo(*PAIR) - 1.5)
    np.testing.assert_array_equal(losses.get("alignment_gap.losses:ipo", beta=0.5)(*PAIR), losses.ipo(*PAIR, beta=0.5))
    with pytest.raises(ValueError, match="setting of margin: unknown 'slop'; did you mean 'slope'"):
        losses.get(name, slop=2.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some_package.others:margin", "'some_package.others:margin': no module 'some_package.others'; install it or"),
        ("no_package.losses:margin", "no module 'no_package'; install it"),
        ("some_package.some_losses:hinge", "the module 'some_package.some_losses' has no function 'hinge'"),
        ("some_package.some_losses:number", "has no function 'number'"),
        (":margin", "':margin' is not of the form 'module:function'"),
        ("some_package.some_losses:", "is not of the form"),
        ("a module:margin", "is not of the form"),
    ],
)
def test_a_module_or_function_that_is_not_there_is_named(module_of_ones_own, name, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        losses.get(name)
    assert "\n" not in str(caught.value)


def test_an_error_inside_a_module_is_told_as_it_is(module_of_ones_own):
    with pytest.raises(ModuleNotFoundError, match="some_module_that_is_not_there"):
        losses.get("some_package.broken:margin")


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
