"""Values worked out by hand.

Every test has the same pair: its log-probs are -1 and -4 under the policy, -2 and -3 under the reference. So w = 1,
l = -1 and h = 2; with beta = 1/2, z = beta h = 1. The tests use these values:
log(1 + e^-1) = 0.3132617, log(1 + e^-1/2) = 0.4740770, log(1 + e^1/2) = 0.9740770,
sigma(1) = 0.7310586, sigma(1/2) = 0.6224593, e^-1 = 0.3678794.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignment_gap import losses

PAIR = (jnp.float32(-1.0), jnp.float32(-4.0), jnp.float32(-2.0), jnp.float32(-3.0))

WITH_REFERENCE = [
    # log(1 + e^-1)
    ("dpo", {}, 0.3132617),
    # 0.8 * 0.3132617 + 0.2 * 1.3132617
    ("dpo", {"label_smoothing": 0.2}, 0.5132617),
    # (0.8 * 0.3132617 - 0.2 * 1.3132617) / 0.6
    ("dpo", {"label_smoothing": 0.2, "smoothing": "robust"}, -0.0200717),
    # (2 - 1 / (2 * 1/2))^2 = 1
    ("ipo", {}, 1.0),
    # (2 - 1 / (2 * 1/4))^2 = 0
    ("ipo", {"beta": 0.25}, 0.0),
    # max(0, 1 - 1)
    ("slic", {}, 0.0),
    # max(0, 1 - 1/2)
    ("slic", {"beta": 0.25}, 0.5),
    ("gpo", {"f": "square"}, 0.25),
    ("gpo", {"f": "exponential"}, 0.3678794),
    # (1 - 1/2)^2
    ("gpo", {"f": "truncated_quadratic", "beta": 0.25}, 0.25),
    # 1 / (1 + e)^2 = 1 / 13.8256
    ("gpo", {"f": "savage"}, 0.0723295),
    # tau = 1: 0.2689414 * 0.3132617 + 0.7310586 * 0.3678794
    ("discopop", {"tau": 1.0}, 0.3531905),
    # e = 0.001: 0.7310586 (-0.3132617 + 0.0010005) + 0.2689414 (-1.3132617 + 6.9077553)
    ("exo", {}, 1.2763096),
    ("f_dpo", {"divergence": "reverse_kl"}, 0.3132617),
    # f' = 1 - 1/u: 0.6321206 and -1.7182818; log(1 + exp(-1.1752012))
    ("f_dpo", {"divergence": "forward_kl"}, 0.2690782),
    # f' = log(2u / (1 + u)): the difference is log(u_w (1 + u_l) / (u_l (1 + u_w))) = 1; log(1 + e^-1/2)
    ("f_dpo", {"divergence": "jensen_shannon"}, 0.4740770),
    # alpha = 1/2, f' = 2 (1 - u^-1/2): 0.7869387 and -1.2974425; log(1 + exp(-1.0421906))
    ("f_dpo", {"divergence": "alpha"}, 0.3020890),
    # phi: e + 1 and 1/e - 1; log(1 + exp(-2.1752012))
    ("chi_po", {}, 0.1075849),
    # clipped at 1
    ("chi_po", {"max_margin": 1.0}, 0.3132617),
    # 0.4740770 + 0.9740770 / 2 + 0.4740770 / 2
    ("nca", {}, 1.1981540),
    # the batch's mean of 1/2 and -1/2 is 0: 2 * 0.4740770
    ("bco", {}, 0.9481540),
    # With a shift of 1/2: log 2 + log(1 + e^-1)
    ("bco", {"shift": 0.5}, 1.0064089),
    # targets +-1
    ("sppo", {}, 0.0),
    # targets +-2
    ("sppo", {"beta": 0.25}, 2.0),
    # 2 (1 - 0.6224593)
    ("apo_zero", {}, 0.7550813),
    # 0.6224593 + 1 - 0.7310586
    ("apo_down", {}, 0.8914007),
    # 3 - (-1) = 2 of a single example is its own sorted order
    ("aot", {}, 0.3132617),
    ("aot", {"coupling": "unpaired"}, 0.3132617),
]


@pytest.mark.parametrize(("name", "settings", "value"), WITH_REFERENCE)
def test_pair_with_reference(name, settings, value):
    np.testing.assert_allclose(losses.get(name, **{"beta": 0.5, **settings})(*PAIR), value, rtol=1e-5, atol=2e-6)


WITHOUT_REFERENCE = [
    # means -1 / 1 and -4 / 2: 2 * 1 - 1 = 1
    ("simpo", {"beta": 2.0, "gamma": 1.0}, 0.3132617),
    # log-odds: -1 - log(1 - e^-1) = -0.5413249 and -2 - log(1 - e^-2) = -1.8545865;
    # 1 + 0.1 log(1 + exp(-1.3132617))
    ("orpo", {"beta": 0.1}, 1.0238181),
    # log(1 + exp(-3/2)) + 1
    ("cpo", {"beta": 0.5}, 1.2014133),
    # one token shorter, at 0.5 for each token: log(1 + e^-1) + 1
    ("cpo", {"beta": 0.5, "length_penalty": 0.5}, 1.3132617),
]


@pytest.mark.parametrize(("name", "settings", "value"), WITHOUT_REFERENCE)
def test_pair_without_reference(name, settings, value):
    lengths = {"chosen_lengths": jnp.int32(1), "rejected_lengths": jnp.int32(2)}
    loss = losses.get(name, **settings)
    np.testing.assert_allclose(loss(chosen_logps=PAIR[0], rejected_logps=PAIR[1], **lengths), value, rtol=1e-5)


def test_slic_hf():
    # max(0, 1 + 1 - 4) + 1, max(0, 5 + 1 - 4) + 1, and 2 + 0.5 * 1.
    chosen, rejected = PAIR[:2]
    assert losses.slic_hf(chosen, rejected) == 1.0
    assert losses.slic_hf(chosen, rejected, delta=5.0) == 3.0
    assert losses.slic_hf(chosen, rejected, delta=5.0, sft_weight=0.5) == 2.5


def test_lengths():
    # Two and four tokens: w = 1/2, l = -1/4, h = 3/4; IPO (3/4 - 1)^2; DPO log(1 + exp(-3/8)).
    lengths = {"chosen_lengths": jnp.int32(2), "rejected_lengths": jnp.int32(4)}
    np.testing.assert_allclose(losses.ipo(*PAIR, **lengths, beta=0.5, over_tokens="mean"), 0.0625, rtol=1e-6)
    np.testing.assert_allclose(losses.dpo(*PAIR, **lengths, beta=0.5, over_tokens="mean"), 0.5231232, rtol=1e-5)
    # R-DPO: z = 1 + 0.1 (2 - 4); log(1 + exp(-0.8)).
    np.testing.assert_allclose(losses.r_dpo(*PAIR, **lengths, beta=0.5, alpha=0.1), 0.3711007, rtol=1e-5)


def test_soft_preferences():
    # p = 3/4: 0.75 * 0.3132617 + 0.25 * 1.3132617.
    np.testing.assert_allclose(losses.dpo(*PAIR, 0.75, beta=0.5), 0.5632617, rtol=1e-5)
    # 0.75 (2 - 1)^2 + 0.25 (-2 - 1)^2 = 3; the regression (2 - 1/2)^2 is p (1 - p) / beta^2 = 3/4 below.
    np.testing.assert_allclose(losses.ipo(*PAIR, 0.75, beta=0.5), 3.0, rtol=1e-6)
    np.testing.assert_allclose(losses.ipo_md(*PAIR, 0.75, beta=0.5), 2.25, rtol=1e-6)
    # Targets +-(0.75 - 0.5) / 0.5 = +-1/2.
    np.testing.assert_allclose(losses.sppo(*PAIR, 0.75, beta=0.5), 0.5, rtol=1e-6)


def test_aot_couples_ranks():
    # log pi(y_w)/pi(y_l) = (5, 1), log ref(y_w)/ref(y_l) = (0, 2): sorted (1, 5) - (0, 2) = (1, 3).
    arrays = [jnp.array(values) for values in ([-1.0, -1.0], [-6.0, -2.0], [-3.0, -1.0], [-3.0, -3.0])]
    np.testing.assert_allclose(losses.aot(*arrays, beta=1.0), [0.3132617, 0.0485874], rtol=1e-5)
    # w = (2, 0), l = (-3, 1): sorted (0, 2) - (-3, 1) = (3, 1).
    unpaired = losses.aot(*arrays, beta=1.0, coupling="unpaired")
    np.testing.assert_allclose(unpaired, [0.0485874, 0.3132617], rtol=1e-5)


def test_kto():
    # r = 1 and -1; z = mean(3, -2) = 1/2; beta = 1/2: 1 - sigma(1/4) and 1 - sigma(3/4).
    arrays = (jnp.array([-1.0, -4.0]), jnp.array([-2.0, -3.0]), jnp.array([1.0, 0.0]))
    kl = (jnp.array([-1.0, -4.0]), jnp.array([-4.0, -2.0]))
    np.testing.assert_allclose(losses.kto(*arrays, *kl, beta=0.5), [0.4378235, 0.3208213], rtol=1e-5)
    # A negative estimate counts as z = 0: 1 - sigma(1/2) on both.
    np.testing.assert_allclose(losses.kto(*arrays, *kl[::-1], beta=0.5), [0.3775407, 0.3775407], rtol=1e-5)


def test_groupwise():
    logps, scores = jnp.array([[-1.0, -2.0, -6.0]]), jnp.array([[0.0, 2.0, 1.0]])
    np.testing.assert_allclose(losses.sft(logps), [3.0])
    np.testing.assert_allclose(losses.best_of_n(logps, scores), [2.0])
    np.testing.assert_allclose(losses.raft(logps, scores, keep=2), [4.0])
    # softmax(0, 2, 1) = (0.0900306, 0.6652410, 0.2447285): 0.0900306 + 1.3304819 + 1.4683708
    np.testing.assert_allclose(losses.reward_weighted_regression(logps, scores), [2.8888833], rtol=1e-5)
    # Against the others' means 1.5, 0.5, 1: advantages -1.5, 1.5, 0; -(1.5 - 3 + 0) / 3
    np.testing.assert_allclose(losses.rloo(logps, scores), [0.5], rtol=1e-6)
    # Against the mean 1: -(1 - 2 + 0) / 3
    np.testing.assert_allclose(losses.reinforce(logps, scores), [1 / 3], rtol=1e-6)
    # Without a baseline: -(0 - 4 - 6) / 3
    np.testing.assert_allclose(losses.reinforce(logps, scores, baseline=0.0), [10 / 3], rtol=1e-6)


def test_rloo_of_another_policys_samples():
    # A = 1/2 - 0 and 0 - 1/2; q = 1.5 and 0.25: -(0.75 - 0.125) / 2.
    logps, scores = jnp.log(jnp.array([0.6, 0.1])), jnp.array([0.5, 0.0])
    old = jnp.log(jnp.array([0.4, 0.4]))
    value, gradient = jax.value_and_grad(losses.rloo)(logps, scores, None, old)
    np.testing.assert_allclose(value, -0.3125, rtol=1e-6)
    # d q / d log pi = q: -(1.5 * 0.5) / 2 and (0.25 * 0.5) / 2.
    np.testing.assert_allclose(gradient, [-0.375, 0.0625], rtol=1e-6)
    # Clipped: the winner at 1.2, the loser pessimistically at 0.8: -(0.6 - 0.4) / 2, and neither has a gradient.
    value, gradient = jax.value_and_grad(lambda logps: losses.rloo(logps, scores, None, old, clip=0.2))(logps)
    np.testing.assert_allclose(value, -0.1, rtol=1e-5)
    np.testing.assert_array_equal(gradient, [0.0, 0.0])


def test_hypo():
    # DPO's log(1 + e^-1), and fresh log-ratios 3 and -1 of mean 1: 0.3132617 + 0.2 * 1.
    fresh, reference = jnp.array([-1.0, -5.0]), jnp.array([-4.0, -4.0])
    loss = losses.get("hypo", beta=0.5, kl_weight=0.2)
    value, (d_chosen, d_fresh) = jax.value_and_grad(loss, (0, 4))(*PAIR, fresh, reference)
    np.testing.assert_allclose(value, 0.5132617, rtol=1e-5)
    # DPO's slope is -0.5 sigma(-1). The weight of a sample is its log-ratio minus the other's: 0.2 * 4 / 2 and its
    # negative.
    np.testing.assert_allclose(d_chosen, -0.5 * 0.2689414, rtol=1e-5)
    np.testing.assert_allclose(d_fresh, [0.4, -0.4], rtol=1e-6)
    # p = 3/4, as in test_soft_preferences.
    np.testing.assert_allclose(loss(*PAIR, fresh, reference, 0.75), 0.5632617 + 0.2, rtol=1e-5)
    # At the reference the default weight pulls as hard as DPO if the log-ratio of a single sample is 5.
    d_chosen, d_fresh = jax.grad(losses.hypo, (0, 4))(*[jnp.float32(0.0)] * 4, jnp.array([5.0]), jnp.zeros(1))
    np.testing.assert_allclose([-d_chosen, d_fresh[0]], [0.05, 0.05], rtol=1e-5)


def test_best_of_n_shares_a_tie():
    value, gradient = jax.value_and_grad(losses.best_of_n)(jnp.array([-1.0, -2.0, -6.0]), jnp.array([1.0, 1.0, 0.0]))
    assert value == 1.5
    np.testing.assert_array_equal(gradient, [-0.5, -0.5, 0.0])


def test_rebel():
    # beta (r_1 - r_2) = 1/2 (1 + 1) = 1 against a reward difference of 1/2.
    arrays = (jnp.array([-1.0, -4.0]), jnp.array([-2.0, -3.0]), jnp.array([0.5, 0.0]))
    np.testing.assert_allclose(losses.rebel(*arrays, beta=0.5), 0.25, rtol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "ppo_clip", "rloo", "reinforce"])
@pytest.mark.parametrize("score", [0.1, 1234.567])
@pytest.mark.parametrize("size", [7, 11])
def test_a_group_of_equal_scores_has_no_gradient(name, score, size):
    """Exactly: the float32 mean of seven times 0.1 is not 0.1."""
    scores, tokens = jnp.full((2, size), score), jnp.full((2, size, 3), -1.5)
    loss = losses.get(name, beta=0.0) if name == "grpo" else losses.get(name)

    def total(tokens):
        if name in ("rloo", "reinforce"):
            return loss(tokens.sum(-1), scores).sum()
        return loss(tokens, scores, jnp.ones(tokens.shape, bool)).sum()

    np.testing.assert_array_equal(jax.grad(total)(tokens), 0.0)


def test_dpo_with_the_nll_of_the_chosen_response():
    """Of 2 and 5 tokens: log(1 + e^-1) and half of 1 / 2 nats. Its gradient is DPO's on the rejected response."""
    loss = losses.combine((1.0, losses.get("dpo", beta=0.5)), (0.5, losses.get("best_of_n", over_tokens="mean")))
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    scores, lengths = jnp.array([1.0, 0.0]), jnp.array([2, 5])

    def value(logps):
        pair = dict(zip(names, (*logps, *PAIR[2:]), strict=True))
        return loss(**pair, logps=logps, scores=scores, lengths=lengths)

    logps = jnp.array(PAIR[:2])
    np.testing.assert_allclose(value(logps), 0.3132617 + 0.25, rtol=1e-6)
    slope = 0.5 * (1 - 0.7310586)
    np.testing.assert_allclose(jax.grad(value)(logps), [-slope - 0.25, slope], rtol=1e-5)


def test_nash_md():
    # x = log pi / ref = 1; s - 1/2 - beta x = 0.9 - 0.5 - 0.2 = 0.2; times -log pi = 1.
    value = losses.nash_md(jnp.array([-1.0]), jnp.array([-2.0]), jnp.array([0.9]), beta=0.2)
    np.testing.assert_allclose(value, 0.2, rtol=1e-6)


TOKENS = jnp.log(jnp.array([[0.6, 0.5, 0.5], [0.1, 0.25, 0.9]]))
OLD = jnp.log(jnp.array([[0.4, 0.5, 0.5], [0.4, 0.25, 0.9]]))
MASK = jnp.array([[True, True, True], [True, True, False]])
SCORES = jnp.array([1.0, 0.0])


def test_clipped_surrogates():
    # Ratios (1.5, 1, 1) and (0.25, 1); advantages +-1/2.
    # Winner: clipped at 1.2: -(1.2 + 1 + 1) / 2. Loser: pessimistic, clipped at 0.8: (0.8 + 1) / 2.
    # PPO: (-1.6 / 3 + 0.9 / 2) / 2. Dr. GRPO: (-1.6 + 0.9) / 2 / 3.
    np.testing.assert_allclose(losses.ppo_clip(TOKENS, SCORES, MASK, OLD), -0.0416667, rtol=1e-5)
    np.testing.assert_allclose(losses.dr_grpo(TOKENS, SCORES, MASK, OLD), -0.1166667, rtol=1e-5)
    # Sample standard deviation 0.7071068: advantages +-0.5 / 0.7072068 = +-0.7070068.
    # Tokens -0.7070068 (1.2 + 1 + 1) and 0.7070068 (0.8 + 1).
    np.testing.assert_allclose(losses.grpo(TOKENS, SCORES, MASK, OLD, beta=0.0), -0.0589172, rtol=1e-5)
    group = losses.grpo(TOKENS, SCORES, MASK, OLD, beta=0.0, over_tokens="group")
    np.testing.assert_allclose(group, -0.7070068 * 1.4 / 5, rtol=1e-5)
    # A higher upper clip: 1.4 instead of 1.2.
    high = losses.ppo_clip(TOKENS, SCORES, MASK, OLD, clip_high=0.4)
    np.testing.assert_allclose(high, (-1.7 / 3 + 0.45) / 2, rtol=1e-5)


def test_ld_dpo():
    # Chosen has 3 tokens at -1, rejected has 2 at -2, the reference is 0. They share 2 tokens; the third counts one
    # half: w = -2.5, l = -4, z = 1.5 * 2/3 = 1.
    # w = -2.5, l = -4, z = 1.5 * 2/3 = 1.
    mask = jnp.array([True, True, True]), jnp.array([True, True, False])
    tokens = jnp.full(3, -1.0), jnp.full(3, -2.0), jnp.zeros(3), jnp.zeros(3)
    np.testing.assert_allclose(losses.ld_dpo(*tokens, *mask, beta=2 / 3, alpha=0.5), 0.3132617, rtol=1e-5)


def test_wpo():
    # Weights e^-1 and e^-2; z = 1/2 (-3 + 4 - 0) = 1/2.
    mask = jnp.array([True, True, True]), jnp.array([True, True, False])
    value = losses.wpo(jnp.full(3, -1.0), jnp.full(3, -2.0), jnp.float32(0.0), jnp.float32(0.0), *mask, beta=0.5)
    np.testing.assert_allclose(value, np.exp(-3.0) * 0.4740770, rtol=1e-5)
    # Collisions of -1 at every token: weights e^0 and e^-1.
    collisions = {"chosen_log_collisions": jnp.full(3, -1.0), "rejected_log_collisions": jnp.full(3, -1.0)}
    sampled = losses.get("wpo", beta=0.5, alignment="sampled")
    arrays = (jnp.full(3, -1.0), jnp.full(3, -2.0), jnp.float32(0.0), jnp.float32(0.0), *mask)
    np.testing.assert_allclose(sampled(*arrays, **collisions), np.exp(-1.0) * 0.4740770, rtol=1e-5)
    np.testing.assert_array_equal(losses.wpo(*arrays, **collisions, beta=0.5), value)


def test_diagnostics():
    pairs = [jnp.array([a, a, b]) for a, b in ((-1.0, -5.0), (-4.0, -4.0), (-2.0, -2.0), (-3.0, -1.0))]
    # w = (1, 1, -3), l = (-1, -1, -3): margins (2, 2, 0); labels sure, at odds, sure.
    out = losses.pairwise_diagnostics(*pairs, jnp.array([1.0, 0.25, 1.0]), beta=0.5)
    np.testing.assert_allclose(out["margin"], [2.0, 2.0, 0.0])
    np.testing.assert_allclose(out["chosen_reward"], [0.5, 0.5, -1.5])
    np.testing.assert_allclose(out["rejected_reward"], [-0.5, -0.5, -1.5])
    np.testing.assert_allclose(out["accuracy"], [1.0, 0.25, 0.5])
    np.testing.assert_allclose(out["chosen_log_ratio"], [1.0, 1.0, -3.0])
    np.testing.assert_allclose(out["rejected_log_ratio"], [-1.0, -1.0, -3.0])


def test_discopop_starts_downhill_at_its_default_temperature():
    # Slope in z at 0: (1 - log 2) / (4 * 0.05) - 3/4 = 0.7842641, and at tau = 1: -0.6732868.
    zero = jnp.float32(0.0)
    for tau, slope in ((0.05, 0.7842641), (1.0, -0.6732868)):
        gradient = jax.grad(losses.discopop)(zero, zero, zero, zero, beta=1.0, tau=tau)
        np.testing.assert_allclose(gradient, slope, rtol=1e-5)
