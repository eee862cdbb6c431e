"""Sampling from policies, and the online source that turns samples into labelled batches."""

from alignment_gap.sampling.online import Labeller, make_generate, online_source, preference_labeller
from alignment_gap.sampling.sampler import SamplerConfig, Samples, draw, restrict, sample, sample_keys

__all__ = [
    "Labeller",
    "SamplerConfig",
    "Samples",
    "draw",
    "make_generate",
    "online_source",
    "preference_labeller",
    "restrict",
    "sample",
    "sample_keys",
]
