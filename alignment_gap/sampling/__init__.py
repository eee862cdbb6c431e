"""Sampling from policies, and the online source that turns samples into batches."""

from alignment_gap.sampling.online import (
    KEEP,
    Begin,
    Draw,
    Score,
    Scores,
    against_each_other,
    against_opponent,
    make_generate,
    online_source,
)
from alignment_gap.sampling.sampler import (
    Mixture,
    SamplerConfig,
    Samples,
    draw,
    loop_weights,
    restrict,
    sample,
    sample_keys,
)

__all__ = [
    "KEEP",
    "Begin",
    "Draw",
    "Mixture",
    "SamplerConfig",
    "Samples",
    "Score",
    "Scores",
    "against_each_other",
    "against_opponent",
    "draw",
    "loop_weights",
    "make_generate",
    "online_source",
    "restrict",
    "sample",
    "sample_keys",
]
