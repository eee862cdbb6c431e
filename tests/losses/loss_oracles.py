"""Every loss in NumPy at float64, written from the formulas of the papers, without care for overflow.

`n` holds the arrays with the library's names. `o` holds the same values; a formula uses `o` where the gradient is
stopped, so finite differences in `n` give the gradient that autodiff should give.
"""

import inspect
import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

POLICY = (
    "chosen_logps",
    "rejected_logps",
    "logps",
    "token_logps",
    "chosen_token_logps",
    "rejected_token_logps",
    "fresh_logps",
)


def namespace(seed: int, batch: tuple[int, ...] = (3,), responses: int = 3, tokens: int = 4) -> SimpleNamespace:
    """Random arrays under all names that losses read."""
    rng = np.random.default_rng(seed)
    group, token = (*batch, responses), (*batch, responses, tokens)

    def logps(shape, low=-6.0):
        return rng.uniform(low, -0.3, shape)

    def mask(shape):
        return np.arange(shape[-1]) < rng.integers(1, shape[-1] + 1, shape[:-1])[..., None]

    n = SimpleNamespace(
        **{name: logps(batch) for name in ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")},
        chosen_lengths=rng.integers(1, 9, batch),
        rejected_lengths=rng.integers(1, 9, batch),
        preference=rng.uniform(0, 1, batch),
        logps=logps(group),
        ref_logps=logps(group),
        scores=rng.uniform(0, 1, group),
        lengths=rng.integers(1, 9, group),
        kl_logps=logps((5,)),
        ref_kl_logps=logps((5,), -9.0),
        old_logps=logps(group),
        fresh_logps=logps((*batch, 2)),
        ref_fresh_logps=logps((*batch, 2)),
        token_logps=logps(token, -2.0),
        old_token_logps=logps(token, -2.0),
        ref_token_logps=logps(token, -2.0),
        mask=mask(token),
        chosen_mask=mask((*batch, tokens)),
        rejected_mask=mask((*batch, tokens + 1)),
    )
    for side, size in (("chosen", tokens), ("rejected", tokens + 1)):
        for name in ("{}_token_logps", "ref_{}_token_logps", "{}_log_collisions"):
            setattr(n, name.format(side), logps((*batch, size), -2.0))
    return n


def sigma(x):
    return 1.0 / (1.0 + np.exp(-x))


def logistic(x):
    return np.log(1.0 + np.exp(-x))


def ratios(n):
    return n.chosen_logps - n.ref_chosen_logps, n.rejected_logps - n.ref_rejected_logps


def margin(n):
    w, r = ratios(n)
    return w - r


def mean_margin(n):
    w, r = ratios(n)
    return w / n.chosen_lengths - r / n.rejected_lengths


def soft(loss):
    """A loss of the two log-ratios, as the expectation over which response wins."""
    return lambda n, o: n.preference * loss(*ratios(n)) + (1 - n.preference) * loss(*ratios(n)[::-1])


def hard(loss):
    return lambda n, o: loss(*ratios(n))


def sorted_difference(a, b):
    return (np.sort(a.ravel()) - np.sort(b.ravel())).reshape(a.shape)


def log_odds(m):
    return np.log(np.exp(m) / (1 - np.exp(m)))


def kto(n, o, z):
    r = n.logps - n.ref_logps
    return n.scores * 1.5 * (1 - sigma(0.5 * (r - z))) + (1 - n.scores) * 0.7 * (1 - sigma(0.5 * (z - r)))


def others_mean(values):
    """For each response, the mean of the other responses in its group."""
    size = values.shape[-1]
    columns = [np.delete(values, k, axis=-1).mean(-1) for k in range(size)]
    return np.stack(columns, -1)


def pairs_mean(values):
    """The mean of the squared difference over pairs."""
    pairs = itertools.combinations(range(values.shape[-1]), 2)
    return np.mean([(values[..., j] - values[..., k]) ** 2 for j, k in pairs], axis=0)


def surrogate(q, advantages, low, high):
    return -np.minimum(q * advantages, np.clip(q, 1 - low, 1 + high) * advantages)


def clipped(n, o, advantages, low, high):
    return surrogate(np.exp(n.token_logps - o.old_token_logps), advantages, low, high)


def k3(n):
    x = n.token_logps - n.ref_token_logps
    return np.exp(-x) - 1 + x


def centred(scores):
    return (scores - scores.mean(-1, keepdims=True))[..., None]


def over_response(values, mask):
    return (values * mask).sum(-1) / mask.sum(-1)


def standardized(scores):
    return centred(scores) / (np.std(scores, axis=-1, ddof=1, keepdims=True) + 1e-4)[..., None]


def grpo_terms(n, o, beta, high):
    return clipped(n, o, standardized(o.scores), 0.2, high) + beta * k3(n)


def shared_sum(logps, mask, other_mask, alpha):
    """A sum over tokens: weight 1 up to the shorter length, weight alpha after it."""
    total = np.zeros(logps.shape[:-1])
    for index in np.ndindex(*logps.shape[:-1]):
        scored = logps[index][mask[index]]
        shared = min(mask[index].sum(), other_mask[index].sum())
        total[index] = scored[:shared].sum() + alpha * scored[shared:].sum()
    return total


def ld_margin(n, alpha):
    def side(policy, reference, mask, other):
        return shared_sum(policy, mask, other, alpha) - shared_sum(reference, mask, other, alpha)

    w = side(n.chosen_token_logps, n.ref_chosen_token_logps, n.chosen_mask, n.rejected_mask)
    return w - side(n.rejected_token_logps, n.ref_rejected_token_logps, n.rejected_mask, n.chosen_mask)


def wpo(n, o, aligned):
    def weight(side):
        mask, values = getattr(o, f"{side}_mask"), getattr(o, f"{side}_token_logps")
        values = values - aligned * getattr(o, f"{side}_log_collisions")
        return np.exp(over_response(values, mask))

    w = (n.chosen_token_logps * n.chosen_mask).sum(-1) - n.ref_chosen_logps
    r = (n.rejected_token_logps * n.rejected_mask).sum(-1) - n.ref_rejected_logps
    return weight("chosen") * weight("rejected") * logistic(0.5 * (w - r))


def score_function(n, advantages):
    return -(advantages * n.logps).mean(-1)


def penalized(o, beta):
    return o.scores - beta * (o.logps - o.ref_logps)


def against_others(rewards):
    return rewards - others_mean(rewards)


def sampled_kl(logps, old, reference):
    """The value at `old`, and the gradient of the KL's estimate with a leave-one-out baseline."""
    x = old - reference
    return (x + against_others(x) * (logps - old)).mean(-1)


def hypo(n, o):
    return logistic(0.5 * margin(n)) + 0.3 * sampled_kl(n.fresh_logps, o.fresh_logps, o.ref_fresh_logps)


# f', the derivative of each divergence's f, at u.
LINKS = {
    "reverse_kl": lambda u: np.log(u) + 1,
    "forward_kl": lambda u: -1 / u,
    "jensen_shannon": lambda u: np.log(2 * u / (1 + u)),
    "alpha": lambda u: (1 - u**-0.3) / 0.3,
}


def f_dpo(divergence):
    link = LINKS[divergence]
    return soft(lambda w, r: logistic(0.5 * (link(np.exp(w)) - link(np.exp(r)))))


def phi_margin(w, r, gamma=1.0):
    return 0.5 * (np.exp(w) + gamma * w - np.exp(r) - gamma * r)


def gpo(curve):
    return soft(lambda w, r: curve(0.5 * (w - r)))


def exo(n, o):
    p = 0.9 * n.preference + 0.1 * (1 - n.preference)
    q = sigma(0.5 * margin(n))
    return q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))


def discopop(w, r):
    z = 0.5 * (w - r)
    modulation = sigma(z / 0.2)
    return (1 - modulation) * logistic(z) + modulation * np.exp(-z)


def robust(w, r):
    z = 0.5 * (w - r)
    return (0.9 * logistic(z) - 0.1 * logistic(-z)) / 0.8


def bco(n, o):
    shift = 0.25 * (np.mean(ratios(o)[0]) + np.mean(ratios(o)[1]))
    return soft(lambda w, r: logistic(0.5 * w - shift) + logistic(shift - 0.5 * r))(n, o)


def aot(n, o):
    d = sorted_difference(n.chosen_logps - n.rejected_logps, n.ref_chosen_logps - n.ref_rejected_logps)
    return 0.9 * logistic(0.5 * d) + 0.1 * logistic(-0.5 * d)


def simpo(n, o):
    m = n.chosen_logps / n.chosen_lengths - n.rejected_logps / n.rejected_lengths
    return n.preference * logistic(1.5 * m - 0.4) + (1 - n.preference) * logistic(-1.5 * m - 0.4)


def orpo(n, o):
    w, r = n.chosen_logps / n.chosen_lengths, n.rejected_logps / n.rejected_lengths
    o_w, o_r = log_odds(w), log_odds(r)
    p = n.preference
    return p * (-w + 0.3 * logistic(o_w - o_r)) + (1 - p) * (-r + 0.3 * logistic(o_r - o_w))


def cpo(n, o):
    z = 0.5 * (n.chosen_logps - n.rejected_logps) + 0.2 * (n.chosen_lengths - n.rejected_lengths)
    return logistic(z) - 0.7 * n.chosen_logps / n.chosen_lengths


def slic_hf(n, o):
    return np.maximum(0, 2.0 - n.chosen_logps + n.rejected_logps) - 0.7 * n.chosen_logps


def raft(n, o):
    order = np.argsort(-n.scores, axis=-1)[..., :2]
    return -np.take_along_axis(n.logps, order, -1).mean(-1)


def reward_weighted(n, o):
    weights = np.exp(n.scores / 0.3)
    return -(weights * n.logps).sum(-1) / weights.sum(-1)


def best_of_n(n, o):
    return -np.take_along_axis(n.logps, n.scores.argmax(-1)[..., None], -1)[..., 0]


def group_tokens_mean(values, mask):
    return (values * mask).sum((-1, -2)) / mask.sum((-1, -2))


def length_penalized(w, r, n):
    return logistic(0.5 * (w - r) + 0.05 * (n.chosen_lengths - n.rejected_lengths))


ALL_SOFT = ("preference",)
LOG_COLLISIONS = ("chosen_log_collisions", "rejected_log_collisions")

# (loss, settings, optional arrays that the loss is given, oracle)
CASES = [
    ("dpo", {"beta": 0.5}, (), hard(lambda w, r: logistic(0.5 * (w - r)))),
    ("dpo", {"beta": 0.5}, ALL_SOFT, soft(lambda w, r: logistic(0.5 * (w - r)))),
    (
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.1},
        (),
        hard(lambda w, r: 0.9 * logistic(0.5 * (w - r)) + 0.1 * logistic(0.5 * (r - w))),
    ),
    ("dpo", {"beta": 0.5, "label_smoothing": 0.1, "smoothing": "robust"}, ALL_SOFT, soft(robust)),
    (
        "dpo",
        {"beta": 0.5, "over_tokens": "mean"},
        ("chosen_lengths", "rejected_lengths"),
        lambda n, o: logistic(0.5 * mean_margin(n)),
    ),
    ("ipo", {"beta": 0.5}, (), hard(lambda w, r: (w - r - 1.0) ** 2)),
    ("ipo", {"beta": 0.25}, ALL_SOFT, soft(lambda w, r: (w - r - 2.0) ** 2)),
    (
        "ipo",
        {"beta": 0.5, "over_tokens": "mean"},
        ("chosen_lengths", "rejected_lengths"),
        lambda n, o: (mean_margin(n) - 1.0) ** 2,
    ),
    ("ipo_md", {"beta": 0.25}, ALL_SOFT, lambda n, o: (margin(n) - (n.preference - 0.5) / 0.25) ** 2),
    ("slic", {"beta": 0.5}, ALL_SOFT, gpo(lambda z: np.maximum(0, 1 - z))),
    ("gpo", {"beta": 0.5, "f": "logistic"}, ALL_SOFT, gpo(logistic)),
    ("gpo", {"beta": 0.5, "f": "square"}, ALL_SOFT, gpo(lambda z: (z - 0.5) ** 2)),
    ("gpo", {"beta": 0.5, "f": "hinge"}, ALL_SOFT, gpo(lambda z: np.maximum(0, 1 - z))),
    ("gpo", {"beta": 0.5, "f": "exponential"}, ALL_SOFT, gpo(lambda z: np.exp(-z))),
    ("gpo", {"beta": 0.5, "f": "truncated_quadratic"}, ALL_SOFT, gpo(lambda z: np.maximum(0, 1 - z) ** 2)),
    ("gpo", {"beta": 0.5, "f": "savage"}, ALL_SOFT, gpo(lambda z: 1 / (1 + np.exp(z)) ** 2)),
    (
        "gpo",
        {"beta": 0.5, "over_tokens": "mean"},
        ("chosen_lengths", "rejected_lengths"),
        lambda n, o: logistic(0.5 * mean_margin(n)),
    ),
    ("discopop", {"beta": 0.5, "tau": 0.2}, ALL_SOFT, soft(discopop)),
    ("exo", {"beta": 0.5, "label_smoothing": 0.1}, ALL_SOFT, exo),
    *(
        ("f_dpo", {"beta": 0.5, "divergence": divergence, "alpha": 0.3}, ALL_SOFT, f_dpo(divergence))
        for divergence in LINKS
    ),
    ("chi_po", {"beta": 0.5}, ALL_SOFT, soft(lambda w, r: logistic(phi_margin(w, r)))),
    (
        "chi_po",
        {"beta": 0.5, "gamma": 0.2, "max_margin": 1.0},
        (),
        hard(lambda w, r: logistic(np.clip(phi_margin(w, r, 0.2), -1, 1))),
    ),
    (
        "r_dpo",
        {"beta": 0.5, "alpha": 0.05},
        ("chosen_lengths", "rejected_lengths"),
        lambda n, o: length_penalized(*ratios(n), n),
    ),
    (
        "nca",
        {"beta": 0.5},
        ALL_SOFT,
        soft(lambda w, r: logistic(0.5 * w) + 0.5 * logistic(-0.5 * w) + 0.5 * logistic(-0.5 * r)),
    ),
    ("bco", {"beta": 0.5}, ALL_SOFT, bco),
    ("bco", {"beta": 0.5, "shift": 0.3}, (), hard(lambda w, r: logistic(0.5 * w - 0.3) + logistic(0.3 - 0.5 * r))),
    ("sppo", {"beta": 0.25}, (), hard(lambda w, r: (w - 2.0) ** 2 + (r + 2.0) ** 2)),
    (
        "sppo",
        {"beta": 0.25},
        ALL_SOFT,
        lambda n, o: (
            (ratios(n)[0] - (n.preference - 0.5) / 0.25) ** 2 + (ratios(n)[1] - (0.5 - n.preference) / 0.25) ** 2
        ),
    ),
    ("apo_zero", {"beta": 0.5}, ALL_SOFT, soft(lambda w, r: 1 - sigma(0.5 * w) + sigma(0.5 * r))),
    ("apo_down", {"beta": 0.5}, ALL_SOFT, soft(lambda w, r: sigma(0.5 * w) + 1 - sigma(0.5 * (w - r)))),
    ("aot", {"beta": 0.5, "label_smoothing": 0.1}, (), aot),
    (
        "aot",
        {"beta": 0.5, "coupling": "unpaired"},
        (),
        lambda n, o: logistic(0.5 * sorted_difference(*ratios(n))),
    ),
    (
        "kto",
        {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        ("kl_logps", "ref_kl_logps"),
        lambda n, o: kto(n, o, max(0.0, np.mean(o.kl_logps - o.ref_kl_logps))),
    ),
    (
        "kto",
        {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        (),
        lambda n, o: kto(n, o, max(0.0, np.mean(o.logps - o.ref_logps))),
    ),
    ("simpo", {"beta": 1.5, "gamma": 0.4}, ALL_SOFT, simpo),
    ("orpo", {"beta": 0.3}, ALL_SOFT, orpo),
    (
        "cpo",
        {"beta": 0.5, "sft_weight": 0.7, "length_penalty": 0.2, "over_tokens": "mean"},
        ("chosen_lengths", "rejected_lengths"),
        cpo,
    ),
    (
        "cpo",
        {"beta": 0.5},
        (),
        lambda n, o: logistic(0.5 * (n.chosen_logps - n.rejected_logps)) - n.chosen_logps,
    ),
    ("slic_hf", {"delta": 2.0, "sft_weight": 0.7}, (), slic_hf),
    (
        "slic_hf",
        {},
        ALL_SOFT,
        lambda n, o: (
            n.preference * (np.maximum(0, 1 - n.chosen_logps + n.rejected_logps) - n.chosen_logps)
            + (1 - n.preference) * (np.maximum(0, 1 - n.rejected_logps + n.chosen_logps) - n.rejected_logps)
        ),
    ),
    ("sft", {}, (), lambda n, o: -n.logps.mean(-1)),
    ("sft", {"over_tokens": "mean"}, ("lengths",), lambda n, o: -(n.logps / n.lengths).mean(-1)),
    ("best_of_n", {}, (), best_of_n),
    ("raft", {"keep": 2}, (), raft),
    ("reward_weighted_regression", {"temperature": 0.3}, (), reward_weighted),
    ("rebel", {"beta": 0.5}, (), lambda n, o: pairs_mean(0.5 * (n.logps - n.ref_logps) - n.scores)),
    (
        "reinforce",
        {"beta": 0.2, "baseline": 0.4},
        ("ref_logps",),
        lambda n, o: score_function(n, penalized(o, 0.2) - 0.4),
    ),
    ("reinforce", {}, (), lambda n, o: score_function(n, centred(o.scores)[..., 0])),
    (
        "rloo",
        {"beta": 0.2},
        ("ref_logps",),
        lambda n, o: score_function(n, against_others(penalized(o, 0.2))),
    ),
    (
        "rloo",
        {},
        ("old_logps",),
        lambda n, o: -(np.exp(n.logps - o.old_logps) * against_others(o.scores)).mean(-1),
    ),
    (
        "rloo",
        {"beta": 0.2, "clip": 0.3},
        ("ref_logps", "old_logps"),
        lambda n, o: surrogate(np.exp(n.logps - o.old_logps), against_others(penalized(o, 0.2)), 0.3, 0.3).mean(-1),
    ),
    ("nash_md", {"beta": 0.2}, (), lambda n, o: score_function(n, penalized(o, 0.2) - 0.5)),
    (
        "grpo",
        {"beta": 0.1, "clip_high": 0.3},
        ("old_token_logps", "ref_token_logps"),
        lambda n, o: over_response(grpo_terms(n, o, 0.1, 0.3), n.mask).mean(-1),
    ),
    (
        "grpo",
        {"beta": 0.0, "over_tokens": "group"},
        ("old_token_logps",),
        lambda n, o: group_tokens_mean(grpo_terms(n, o, 0.0, 0.2), n.mask),
    ),
    (
        "grpo",
        {"beta": 0.1, "over_tokens": "sum"},
        ("old_token_logps", "ref_token_logps"),
        lambda n, o: (grpo_terms(n, o, 0.1, 0.2) * n.mask).sum(-1).mean(-1),
    ),
    (
        "dr_grpo",
        {"max_length": 7, "beta": 0.1},
        ("old_token_logps", "ref_token_logps"),
        lambda n, o: ((clipped(n, o, centred(o.scores), 0.2, 0.2) + 0.1 * k3(n)) * n.mask).sum(-1).mean(-1) / 7,
    ),
    (
        "ppo_clip",
        {"clip": 0.1, "clip_high": 0.4},
        ("old_token_logps",),
        lambda n, o: over_response(clipped(n, o, centred(o.scores), 0.1, 0.4), n.mask).mean(-1),
    ),
    (
        "ppo_clip",
        {},
        ("old_token_logps",),
        lambda n, o: over_response(clipped(n, o, centred(o.scores), 0.2, 0.2), n.mask).mean(-1),
    ),
    ("ld_dpo", {"beta": 0.5, "alpha": 0.3}, (), lambda n, o: logistic(0.5 * ld_margin(n, 0.3))),
    ("wpo", {"beta": 0.5}, (), lambda n, o: wpo(n, o, 0.0)),
    ("wpo", {"beta": 0.5}, LOG_COLLISIONS, lambda n, o: wpo(n, o, 0.0)),
    ("wpo", {"beta": 0.5, "alignment": "sampled"}, LOG_COLLISIONS, lambda n, o: wpo(n, o, 1.0)),
    ("online_kl", {}, (), lambda n, o: sampled_kl(n.logps, o.logps, o.ref_logps)),
    ("hypo", {"beta": 0.5, "kl_weight": 0.3}, (), hypo),
    (
        "hypo",
        {"beta": 0.5, "kl_weight": 0.0},
        ALL_SOFT,
        soft(lambda w, r: logistic(0.5 * (w - r))),
    ),
]
IDS = [f"{i}-{name}-{'-'.join(map(str, settings.values()))}" for i, (name, settings, _, _) in enumerate(CASES)]


def finite_difference(oracle, n, name):
    """Central differences of the oracle's sum with respect to one array."""
    o = SimpleNamespace(**vars(n))
    base = getattr(n, name)
    gradient = np.zeros_like(base)
    step = 1e-6
    for index in np.ndindex(*base.shape):
        sides = []
        for sign in (1, -1):
            moved = base.copy()
            moved[index] += sign * step
            sides.append(np.sum(oracle(SimpleNamespace(**{**vars(n), name: moved}), o)))
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient


def arrays_for(loss, n, optional):
    """The arrays that a loss takes: the required ones, and the optional ones of the case."""
    parameters = inspect.signature(loss).parameters.values()
    names = [
        each.name
        for each in parameters
        if each.kind is each.POSITIONAL_OR_KEYWORD and (each.default is each.empty or each.name in optional)
    ]
    return {
        name: jnp.asarray(value, jnp.float32 if value.dtype == np.float64 else value.dtype.name.replace("64", "32"))
        for name, value in ((name, getattr(n, name)) for name in names)
    }
