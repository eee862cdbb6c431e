"""Policies (T5-style encoder-decoders, PaLM-style decoders) with one interface, and preference models over them."""

import functools

from alignment_gap.models.adapters import AdapterConfig, Adapters
from alignment_gap.models.decoder import DecoderConfig, DecoderPolicy
from alignment_gap.models.low_rank import merged
from alignment_gap.models.policy import (
    Output,
    Policy,
    abstract_parameters,
    compute_params,
    count_parameters,
    response_hidden,
    score,
    score_with_collisions,
)
from alignment_gap.models.preference import PreferenceModel
from alignment_gap.models.reward_head import RewardHead
from alignment_gap.models.t5 import T5Config, T5Policy

ModelConfig = T5Config | DecoderConfig


@functools.cache
def make_policy(config: ModelConfig) -> Policy:
    """The policy of a config; equal configs give the same object. Raises UserError if the sizes do not fit together."""
    return T5Policy(config) if isinstance(config, T5Config) else DecoderPolicy(config)


__all__ = [
    "AdapterConfig",
    "Adapters",
    "DecoderConfig",
    "DecoderPolicy",
    "ModelConfig",
    "Output",
    "Policy",
    "PreferenceModel",
    "RewardHead",
    "T5Config",
    "T5Policy",
    "abstract_parameters",
    "compute_params",
    "count_parameters",
    "make_policy",
    "merged",
    "response_hidden",
    "score",
    "score_with_collisions",
]
