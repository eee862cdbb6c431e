"""Properties of every loss, for any numbers."""

import inspect
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays_of
from loss_oracles import CASES, IDS, POLICY, arrays_for, namespace

from alignment_gap import losses

# Contrastive losses with a reference, over sides or over the margin, that take soft preferences as an expectation.
OF_MARGIN = ["dpo", "ipo", "slic", "gpo", "discopop", "exo"]
OF_SIDES = ["nca", "bco", "apo_zero", "apo_down", "f_dpo", "chi_po"]
BY_TARGET = ["sppo", "ipo_md"]
AT_STEP_ZERO = {
    "dpo": np.log(2),
    # 1 / (4 beta^2) at beta = 0.1.
    "ipo": 25.0,
    "ipo_md": 25.0,
    "slic": 1.0,
    "nca": 2 * np.log(2),
    "bco": 2 * np.log(2),
    "sppo": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": np.log(2),
    "f_dpo": np.log(2),
    "chi_po": np.log(2),
    # (log 2 + 1) / 2
    "discopop": 0.5 * (np.log(2) + 1),
    # KL((1/2, 1/2) || (0.999, 0.001))
    "exo": -0.5 * np.log(4 * 0.999 * 0.001),
}
LOGPS = arrays_of.arrays(np.float32, (4, 5), elements=strategies.floats(-200, 0, width=32))
FRESH = arrays_of.arrays(np.float32, (2, 5, 3), elements=strategies.floats(-50, 0, width=32))
LIMITED = hypothesis.settings(max_examples=25, deadline=None)
# In float32, 1 - p is exact. A rounded label would be another preference, and losses of 1e5 would show it.
EXACT_PREFERENCE = strategies.integers(0, 4096).map(lambda i: i / 4096)

jitted = {name: jax.jit(losses.get(name)) for name in (*OF_MARGIN, *OF_SIDES, *BY_TARGET, "aot")}


@pytest.mark.parametrize("name", AT_STEP_ZERO)
def test_step_zero(name):
    logps = jnp.array([-3.0, -70.0]), jnp.array([-4.0, -1.0])
    np.testing.assert_allclose(jitted[name](*logps, *logps), AT_STEP_ZERO[name], rtol=1e-5)


@pytest.mark.parametrize("name", [*OF_MARGIN, *OF_SIDES, *BY_TARGET])
@LIMITED
@hypothesis.given(logps=LOGPS, preference=arrays_of.arrays(np.float32, 5, elements=EXACT_PREFERENCE))
def test_swapping_sides_flips_the_preference(name, logps, preference):
    w, r, ref_w, ref_r = logps
    np.testing.assert_allclose(
        jitted[name](w, r, ref_w, ref_r, preference),
        jitted[name](r, w, ref_r, ref_w, 1 - preference),
        rtol=1e-4,
        atol=1e-3,
    )


# In EXO the label is the target distribution; its oracle covers it.
@pytest.mark.parametrize("name", [name for name in (*OF_MARGIN, *OF_SIDES) if name != "exo"])
@LIMITED
@hypothesis.given(logps=LOGPS, preference=strategies.floats(0, 1, width=32))
def test_soft_labels_are_expectations(name, logps, preference):
    w, r, ref_w, ref_r = logps
    both = jitted[name](w, r, ref_w, ref_r), jitted[name](r, w, ref_r, ref_w)
    mixed = preference * both[0] + (1 - preference) * both[1]
    np.testing.assert_allclose(jitted[name](w, r, ref_w, ref_r, jnp.full(5, preference)), mixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*OF_MARGIN, "ipo_md"])
@LIMITED
@hypothesis.given(logps=LOGPS, shift=strategies.integers(-64, 64))
def test_losses_of_the_margin_ignore_a_constant_on_both_sides(name, logps, shift):
    # Multiples of 1/4, so that adding the constant is exact.
    w, r, ref_w, ref_r = np.round(4 * logps) / 4
    np.testing.assert_array_equal(jitted[name](w, r, ref_w, ref_r), jitted[name](w + shift, r + shift, ref_w, ref_r))


@pytest.mark.parametrize("name", [*OF_SIDES, *BY_TARGET, *OF_MARGIN])
@LIMITED
@hypothesis.given(logps=LOGPS, shift=strategies.integers(-64, 64))
def test_only_log_ratios_count(name, logps, shift):
    w, r, ref_w, ref_r = np.round(4 * logps) / 4
    moved = jitted[name](w + shift, r, ref_w + shift, ref_r)
    np.testing.assert_array_equal(jitted[name](w, r, ref_w, ref_r), moved)


@LIMITED
@hypothesis.given(logps=LOGPS, order=strategies.permutations(range(5)))
def test_aot_ignores_the_order_of_the_batch(logps, order):
    expected = np.sort(jitted["aot"](*logps))
    np.testing.assert_allclose(np.sort(jitted["aot"](*logps[:, order])), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("preference", [None, 0.3])
def test_dpo_ipo_and_slic_are_members_of_the_family(beta, preference):
    n = namespace(seed=1, batch=(50,))
    pair = [jnp.asarray(each, jnp.float32) for each in (n.chosen_logps, n.rejected_logps)]
    pair += [jnp.asarray(each, jnp.float32) for each in (n.ref_chosen_logps, n.ref_rejected_logps)]

    def member(f, beta=beta):
        return losses.gpo(*pair, preference, f=f, beta=beta)

    np.testing.assert_array_equal(losses.dpo(*pair, preference, beta=beta), member("logistic"))
    np.testing.assert_array_equal(losses.slic(*pair, preference, beta=beta), member("hinge"))
    target = 1 / (2 * beta)
    np.testing.assert_array_equal(losses.ipo(*pair, preference, beta=beta), member(lambda h: (h - target) ** 2, 1.0))
    np.testing.assert_allclose(losses.ipo(*pair, preference, beta=beta), member("square") / beta**2, rtol=2e-5)
    # The paper's square, (1 - z)^2, is IPO with half the beta.
    original = member(lambda z: (1 - z) ** 2, 2 * beta) / (4 * beta**2)
    np.testing.assert_allclose(losses.ipo(*pair, preference, beta=beta), original, rtol=2e-5)


@pytest.mark.parametrize("curve", ["logistic", "square", "hinge", "exponential", "truncated_quadratic"])
@LIMITED
@hypothesis.given(
    z=arrays_of.arrays(np.float32, (2, 4), elements=strategies.floats(-300, 300, width=32)).map(jnp.asarray)
)
def test_named_curves_are_convex(curve, z):
    zero = jnp.zeros(4)
    a, b = (losses.gpo(each, zero, zero, zero, f=curve, beta=1.0) for each in z)
    middle = losses.gpo(0.5 * (z[0] + z[1]), zero, zero, zero, f=curve, beta=1.0)
    assert np.all(middle <= 0.5 * (a + b) * (1 + 1e-5) + 1e-5)


def extreme(n, pattern):
    """The namespace with all log-probs 0 or -1e4; the pattern opposes policy and reference."""
    values = dict(vars(n))
    for i, name in enumerate(sorted(key for key in values if "logps" in key or "collisions" in key)):
        values[name] = np.full_like(values[name], -1e4 * ((pattern >> (i % 6)) & 1))
    return type(n)(**values)


@pytest.mark.parametrize(("name", "settings", "optional", "oracle"), CASES, ids=IDS)
def test_extreme_log_ratios_are_finite(name, settings, optional, oracle):
    loss = losses.get(name, **settings)

    def total(policy, rest):
        return jnp.sum(loss(**policy, **rest))

    compiled = jax.jit(jax.value_and_grad(total))
    for pattern in (0, 1, 2, 5, 10, 21, 42, 63):
        arrays = arrays_for(loss, extreme(namespace(seed=0), pattern), optional)
        policy = {key: arrays.pop(key) for key in POLICY if key in arrays}
        value, gradients = compiled(policy, arrays)
        assert np.isfinite(value), pattern
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values()), pattern


@pytest.mark.parametrize(("name", "settings", "optional", "oracle"), CASES, ids=IDS)
def test_bfloat16_is_computed_in_float32(name, settings, optional, oracle):
    loss = losses.get(name, **settings)
    arrays = arrays_for(loss, namespace(seed=2), optional)
    low = {key: value.astype(jnp.bfloat16) if value.dtype == jnp.float32 else value for key, value in arrays.items()}
    widened = {key: value.astype(jnp.float32) if value.dtype == jnp.bfloat16 else value for key, value in low.items()}
    value = loss(**low)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, loss(**widened))


@pytest.mark.parametrize("name", losses.names())
def test_vmap_equals_the_batch_unless_the_loss_reads_other_prompts(name):
    loss = losses.get(name)
    optional = ("chosen_lengths", "rejected_lengths", "ref_token_logps")
    n = namespace(seed=4)
    # The reference is less likely, because KTO clips the mean at 0.
    n.ref_logps = n.ref_logps - 3.0
    arrays = arrays_for(loss, n, optional)
    mapped = jax.vmap(lambda arrays: loss(**arrays))(arrays)
    alone = np.allclose(mapped, loss(**arrays), rtol=1e-6, atol=1e-6)
    assert alone == (losses.OTHER_PROMPTS not in losses.reads(loss))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", [*OF_MARGIN, *OF_SIDES, *BY_TARGET, "aot"])
def test_shapes_and_types_are_checked_first(name):
    loss, logps = losses.get(name), jnp.zeros(3)
    with pytest.raises(AssertionError):
        loss(logps, logps, logps, jnp.zeros(4))
    with pytest.raises(AssertionError):
        loss(logps, logps, logps, jnp.zeros((1, 3)))
    with pytest.raises(AssertionError):
        loss(logps, logps, logps, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="beta must be above 0"):
        losses.get(name, beta=0.0)(logps, logps, logps, logps)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *(("dpo", "beta", value) for value in (math.inf, np.float32(-0.1), jnp.float32(0.0), "0.1", True)),
        *(("chi_po", *each) for each in (("max_log_ratio", 61.0), ("max_margin", -1.0), ("gamma", -1.0))),
        *(("grpo", *each) for each in (("clip", -0.2), ("clip", 2.0), ("clip_high", -0.1), ("beta", -1.0))),
        *(("kto", f"{each}desirable_weight", -1.0) for each in ("", "un")),
        *(
            ("aot", "label_smoothing", 0.5),
            ("ld_dpo", "alpha", -3.0),
            ("orpo", "beta", -1.0),
            ("cpo", "sft_weight", -1),
        ),
        *(("dr_grpo", "max_length", 0), ("rloo", "clip", 1.5), ("nash_md", "beta", -1.0), ("hypo", "kl_weight", -1.0)),
    ],
)
def test_settings_out_of_range_are_refused(name, setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be"):
        losses.get(name, **{setting: value})(**arrays_for(losses.get(name), namespace(0), ("old_logps",)))


@pytest.mark.parametrize("name", [*OF_MARGIN, *OF_SIDES, *BY_TARGET])
def test_a_number_that_is_no_probability_is_no_preference(name):
    """Such as a beta in its place."""
    loss, logps = losses.get(name), jnp.zeros(3)
    with pytest.raises(ValueError, match=r"preference must be in \[0, 1\], got 1.5"):
        loss(logps, logps, logps, logps, 1.5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "ppo_clip"])
def test_scores_are_those_of_the_responses(name):
    token_logps, mask = jnp.zeros((3, 2, 4)), jnp.ones((3, 2, 4), bool)
    for scores in (jnp.ones((1, 2)), jnp.ones(2)):
        with pytest.raises(AssertionError):
            losses.get(name)(token_logps, scores, mask, token_logps)
    with pytest.raises(ValueError, match="at least 2 responses a prompt"):
        losses.get(name)(token_logps[:, :1], jnp.ones((3, 1)), mask[:, :1])
    if name != "ppo_clip":
        with pytest.raises(AssertionError):
            losses.get(name, beta=0.1)(token_logps, jnp.ones((3, 2)), mask, None, token_logps[..., :1])


def test_arrays_of_kto_s_threshold_belong_together():
    z = jnp.zeros(3)
    for one in ("kl_logps", "ref_kl_logps"):
        with pytest.raises(ValueError, match="kl_logps and ref_kl_logps belong together"):
            losses.kto(z, z, z, **{one: z})


@pytest.mark.usefixtures("unchecked")
def test_lists_are_no_arrays():
    z = jnp.zeros(2)
    with pytest.raises(AssertionError, match=r"an array is needed here, got \[-1.0, -2.0\]"):
        losses.dpo([-1.0, -2.0], z, z, z)


Z, IDS, TOKENS, MASK = jnp.zeros(4), jnp.zeros(4, jnp.int32), jnp.zeros((4, 2, 3)), jnp.ones((4, 2, 3), bool)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.grpo(TOKENS, TOKENS[..., 0], MASK.astype(jnp.float32)),
            "mask: an array of boolean type is needed here, got float32",
        ),
        (lambda: losses.grpo(TOKENS, TOKENS[..., 0], [True]), r"mask: an array is needed here, got \[True\]"),
        (
            lambda: losses.dpo(Z, Z[:2], Z, Z),
            r"rejected_logps has the shape \(2,\), but chosen_logps has \(4,\): give equal shapes",
        ),
        (lambda: losses.dpo(Z, Z, Z, IDS), "ref_rejected_logps: an array of floating type is needed here, got int32"),
        (lambda: losses.dpo(Z, Z, [0.0], Z), r"ref_chosen_logps: an array is needed here, got \[0.0\]"),
        (lambda: losses.dpo(Z, Z, Z, Z, Z[:3]), r"preference has the shape \(3,\): \(4,\) is needed here"),
        (
            lambda: losses.ipo(Z, Z, Z, Z, None, Z, IDS, over_tokens="mean"),
            "chosen_lengths: an array of integer type is needed here, got float32",
        ),
        (lambda: losses.kto(Z, Z, IDS), "scores: an array of floating type is needed here, got int32"),
        (lambda: losses.sft([1.0]), "logps: an array is needed here"),
        (
            lambda: losses.wpo(TOKENS[0], TOKENS[0], Z[:2], Z[:2], MASK[0], MASK[0, :1]),
            r"rejected_mask has the shape \(1, 3\): \(2, 3\) is needed here",
        ),
        (lambda: losses.token_log_probs(Z[None], TOKENS[0], Z), "hidden has the shape"),
        (lambda: losses.token_log_probs(TOKENS, TOKENS[0], Z), "targets: an array of integer type is needed here"),
    ],
)
def test_a_wrong_array_is_named(call, message):
    with pytest.raises(AssertionError, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "ppo_clip", "ld_dpo", "wpo"])
def test_padding_does_not_count(name):
    """Numbers at padding, even NaN, change neither value nor gradient."""
    loss = losses.get(name)
    arrays = arrays_for(loss, namespace(seed=5), ("ref_token_logps", "old_token_logps"))
    masks = {5: arrays.get("rejected_mask"), 4: arrays.get("mask", arrays.get("chosen_mask"))}
    poisoned = {
        key: jnp.where(masks[value.shape[-1]], value, jnp.nan) if "token_logps" in key else value
        for key, value in arrays.items()
    }

    def run(arrays):
        policy = {key: arrays[key] for key in POLICY if key in arrays}
        rest = {key: value for key, value in arrays.items() if key not in policy}
        return jax.value_and_grad(lambda policy: jnp.sum(loss(**policy, **rest)))(policy)

    (value, gradients), (clean, expected) = run(poisoned), run(arrays)
    np.testing.assert_array_equal(value, clean)
    for key in expected:
        np.testing.assert_array_equal(gradients[key], expected[key])
        assert np.all(np.asarray(gradients[key])[~np.asarray(masks[gradients[key].shape[-1]])] == 0)


@pytest.mark.parametrize("name", ["reinforce", "rloo", "nash_md", "grpo", "dr_grpo", "ppo_clip"])
def test_only_the_policys_log_probs_have_a_gradient(name):
    loss = losses.get(name)
    arrays = arrays_for(loss, namespace(seed=9), ("old_logps", "old_token_logps", "ref_token_logps"))
    fixed = {key: arrays.pop(key) for key in list(arrays) if key.startswith(("scores", "old_"))}
    gradients = jax.grad(lambda fixed: jnp.sum(loss(**arrays, **fixed)))(fixed)
    for key, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, 0.0, err_msg=key)


def test_kto_takes_no_gradient_through_its_baseline():
    n = namespace(seed=10)
    arrays = arrays_for(losses.kto, n, ("kl_logps", "ref_kl_logps"))
    kl = {key: arrays.pop(key) for key in ("kl_logps", "ref_kl_logps")}
    for gradient in jax.grad(lambda kl: jnp.sum(losses.kto(**arrays, **kl)))(kl).values():
        np.testing.assert_array_equal(gradient, 0.0)


@LIMITED
@hypothesis.given(
    kl=arrays_of.arrays(np.float32, (2, 6, 2), elements=strategies.floats(-50, 0, width=32)).map(jnp.asarray)
)
def test_kto_reads_the_mean_of_its_kl_arrays_whatever_their_shape(kl):
    arrays = arrays_for(losses.kto, namespace(seed=11), ())
    groups = losses.kto(**arrays, kl_logps=kl[0], ref_kl_logps=kl[1])
    row = losses.kto(**arrays, kl_logps=kl[0].ravel(), ref_kl_logps=kl[1].ravel())
    difference = jnp.mean(kl[0] - kl[1], keepdims=True)
    mean = losses.kto(**arrays, kl_logps=difference, ref_kl_logps=jnp.zeros_like(difference))
    np.testing.assert_allclose(groups, row, rtol=1e-5)
    np.testing.assert_allclose(groups, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [0.1, 0.5])
@LIMITED
@hypothesis.given(
    logps=arrays_of.arrays(np.float32, (3, 4), elements=strategies.floats(-5, 0, width=32)).map(jnp.asarray)
)
def test_rloos_clip_is_pessimistic_and_stops_the_gradient(clip, logps):
    """The value is never below that of the plain ratio.

    There is no gradient after q passes the clip in the advantage's direction.
    """
    policy, old, scores = logps
    plain = losses.rloo(policy, scores, old_logps=old)
    clipped, gradient = jax.value_and_grad(lambda policy: losses.rloo(policy, scores, old_logps=old, clip=clip))(policy)
    assert clipped >= plain - 1e-4 * (1 + abs(plain))
    ratio, advantage = np.exp(policy - old), scores - np.mean(scores)
    beyond = ((advantage > 1e-5) & (ratio > 1 + clip + 1e-5)) | ((advantage < -1e-5) & (ratio < 1 - clip - 1e-5))
    np.testing.assert_array_equal(np.asarray(gradient)[beyond], 0.0)
    within = np.abs(ratio - 1) < clip - 1e-5
    expected = jax.grad(lambda policy: losses.rloo(policy, scores, old_logps=old))(policy)
    np.testing.assert_allclose(np.asarray(gradient)[within], np.asarray(expected)[within], rtol=1e-4, atol=1e-6)


@LIMITED
@hypothesis.given(logps=LOGPS, fresh=FRESH)
def test_hypo_is_the_sum_of_its_two_terms(logps, fresh):
    logps, fresh = jnp.asarray(logps), jnp.asarray(fresh)
    ours = losses.hypo(*logps, *fresh, 0.25, beta=0.2, kl_weight=0.3)
    theirs = losses.dpo(*logps, 0.25, beta=0.2) + 0.3 * losses.online_kl(*fresh)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    without = losses.hypo(*logps, *fresh, beta=0.2, kl_weight=0.0)
    np.testing.assert_array_equal(without, losses.dpo(*logps, beta=0.2))


@pytest.mark.usefixtures("unchecked")
def test_shapes_of_old_and_fresh_log_probs_are_checked():
    two, three = jnp.zeros((2, 2)), jnp.zeros((2, 3))
    with pytest.raises(AssertionError):
        losses.rloo(two, two, old_logps=three)
    with pytest.raises(AssertionError):
        losses.hypo(*[jnp.zeros(2)] * 4, two, three)
    with pytest.raises(AssertionError):
        losses.kto(two, two, two, kl_logps=two, ref_kl_logps=three)


def test_alpha_divergence_joins_reverse_and_forward_kl():
    n = namespace(seed=6, batch=(20,))
    pair = list(arrays_for(losses.f_dpo, n, ()).values())
    near_zero = losses.f_dpo(*pair, divergence="alpha", alpha=1e-4)
    np.testing.assert_allclose(near_zero, losses.f_dpo(*pair), rtol=2e-3)
    at_one = losses.f_dpo(*pair, divergence="alpha", alpha=1.0)
    np.testing.assert_array_equal(at_one, losses.f_dpo(*pair, divergence="forward_kl"))


def test_limits_of_reward_weighted_regression():
    logps, scores = jnp.array([-1.0, -2.0, -6.0]), jnp.array([0.0, 2.0, 1.0])
    hot = losses.reward_weighted_regression(logps, scores, temperature=1e6)
    np.testing.assert_allclose(hot, losses.sft(logps), rtol=1e-5)
    cold = losses.reward_weighted_regression(logps, scores, temperature=1e-3)
    np.testing.assert_allclose(cold, losses.best_of_n(logps, scores), rtol=1e-6)


def test_every_docstring_names_its_source_and_its_convention_over_tokens():
    for name in {name for name, *_ in CASES}:
        text = inspect.getdoc(losses.get(name))
        assert "arXiv" in text or name == "sft", name
        assert "token" in text, name
        assert "Returns:" in text and "Args:" in text, name
