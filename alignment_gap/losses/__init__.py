"""Preference losses as pure functions on arrays.

A loss takes log-probs of any leading batch shape and returns one float32 value per example. It does not reduce over the
batch. Positional-or-keyword parameters are arrays; keyword-only parameters are settings. `reads` lists what a loss
depends on beyond the arrays of its own prompt.
"""

from alignment_gap.losses._combine import combine
from alignment_gap.losses._diagnostics import pairwise_diagnostics
from alignment_gap.losses._groupwise import best_of_n, raft, rebel, reward_weighted_regression, sft
from alignment_gap.losses._hybrid import hypo
from alignment_gap.losses._pairwise import chi_po, discopop, dpo, exo, f_dpo, gpo, ipo, ipo_md, r_dpo, slic
from alignment_gap.losses._policy_gradient import dr_grpo, grpo, nash_md, ppo_clip, reinforce, rloo
from alignment_gap.losses._reference_free import cpo, orpo, simpo, slic_hf
from alignment_gap.losses._registry import (
    LOG_COLLISIONS,
    OTHER_PROMPTS,
    OWN_SAMPLES,
    PROBABILITIES,
    SAMPLER_LOG_PROBS,
    WIDTH,
    aliases,
    arrays,
    get,
    names,
    reads,
)
from alignment_gap.losses._regularizers import categorical_kl, entropy, geometric_mixture, kl_estimate, online_kl
from alignment_gap.losses._sides import aot, apo_down, apo_zero, bco, kto, nca, sppo
from alignment_gap.losses._token_log_probs import token_entropy, token_kl, token_log_collision, token_log_probs
from alignment_gap.losses._token_weighted import ld_dpo, wpo, wpo_weights

__all__ = [
    "LOG_COLLISIONS",
    "OTHER_PROMPTS",
    "OWN_SAMPLES",
    "PROBABILITIES",
    "SAMPLER_LOG_PROBS",
    "WIDTH",
    "aliases",
    "aot",
    "apo_down",
    "apo_zero",
    "arrays",
    "bco",
    "best_of_n",
    "categorical_kl",
    "chi_po",
    "combine",
    "cpo",
    "discopop",
    "dpo",
    "dr_grpo",
    "entropy",
    "exo",
    "f_dpo",
    "geometric_mixture",
    "get",
    "gpo",
    "grpo",
    "hypo",
    "ipo",
    "ipo_md",
    "kl_estimate",
    "kto",
    "ld_dpo",
    "names",
    "nash_md",
    "nca",
    "online_kl",
    "orpo",
    "pairwise_diagnostics",
    "ppo_clip",
    "r_dpo",
    "raft",
    "reads",
    "rebel",
    "reinforce",
    "reward_weighted_regression",
    "rloo",
    "sft",
    "simpo",
    "slic",
    "slic_hf",
    "sppo",
    "token_entropy",
    "token_kl",
    "token_log_collision",
    "token_log_probs",
    "wpo",
    "wpo_weights",
]
