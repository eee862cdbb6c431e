"""Results of studies with known effects."""

import math

import numpy as np

from alignment_gap.study.analysis import CheckpointResult

ONLINE, OFFLINE = ("online", "ipo"), ("offline", "ipo")


def checkpoint(arm, step, *, loss="ipo", beta=0.1, lr=1e-3, seed=0, size=16, **means):
    """A checkpoint whose examples all equal the mean, so no estimate has noise."""
    outcomes = {metric: np.full(size, value) for metric, value in means.items()}
    return CheckpointResult(arm, loss, beta, lr, seed, step, outcomes)


def origin(seed=0, **means):
    means = {"kl": 0.0, "win_rate": 0.2, **means}
    return checkpoint("sft", 0, loss="sft", beta=math.nan, lr=math.nan, seed=seed, **means)


def two_runs(online=(0.5, 0.8), offline=(0.4, 0.7), seed=0):
    """The origin and one run of each arm, with the win rates at 1 and 4 nats."""
    results = [origin(seed)]
    for arm, win_rates in (("online", online), ("offline", offline)):
        results += [checkpoint(arm, 1, seed=seed, kl=1.0, win_rate=win_rates[0])]
        results += [checkpoint(arm, 2, seed=seed, kl=4.0, win_rate=win_rates[1])]
    return results
