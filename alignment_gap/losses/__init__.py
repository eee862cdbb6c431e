"""Preference losses as pure functions on arrays.

A loss takes log-probs of any leading batch shape and returns one float32 value per example, with no reduction over the
batch. Positional-or-keyword parameters are arrays, keyword-only ones settings.
"""

from alignment_gap.losses._diagnostics import pairwise_diagnostics
from alignment_gap.losses._groupwise import best_of_n, sft
from alignment_gap.losses._pairwise import dpo, ipo
from alignment_gap.losses._registry import get, names
from alignment_gap.losses._token_log_probs import categorical_kl, token_kl, token_log_probs

__all__ = [
    "best_of_n",
    "categorical_kl",
    "dpo",
    "get",
    "ipo",
    "names",
    "pairwise_diagnostics",
    "sft",
    "token_kl",
    "token_log_probs",
]
