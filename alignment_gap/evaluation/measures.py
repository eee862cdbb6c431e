"""Measurements of policies and judges: one value for each prompt or pair, so that every mean has an interval."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.evaluation.batching import Batching
from alignment_gap.evaluation.metrics import classification, make_divergence, preferences
from alignment_gap.judges import REWARDS, Judge
from alignment_gap.models import Policy
from alignment_gap.training import make_score

# Responses int32[N, R] and their lengths int32[N], one for each prompt.
Responses = tuple[np.ndarray, np.ndarray]
Outcomes = dict[str, np.ndarray]


def judge_scores(judge: Judge, batching: Batching, texts: tuple[Any, ...]) -> Any:
    """A judge's scores [N, K] of texts on the host: prompts, prompt lengths, responses and their lengths.

    Raises:
      UserError: a token id is outside the judge's vocabulary.
    """
    judge.check(texts[0], texts[2])
    return batching.run(judge.scores, texts)


def judged(
    judges: Mapping[str, Judge],
    batching: Batching,
    prompts: PreferenceBatch,
    responses: Responses,
    opponents: Mapping[str, Responses],
) -> Outcomes:
    """Judges the responses: rewards as reward.JUDGE, preferences over opponents' responses as win_rate.JUDGE.OPPONENT.

    If the judge gave no answer for a prompt, its win rate is nan and its given_up.JUDGE.OPPONENT is 1. If the judge
    answered for all prompts, there is no given_up.JUDGE.OPPONENT.
    """
    asked = (prompts.prompts, prompts.prompt_lengths)
    outcomes = {}
    for name, judge in judges.items():
        for other, theirs in opponents.items():
            scores = judge_scores(judge, batching, (*asked, *_side_by_side(responses, theirs)))
            outcomes[f"win_rate.{name}.{other}"] = preferences(scores, judge.kind)
            if (unanswered := np.isnan(scores).any(axis=1)).any():
                outcomes[f"given_up.{name}.{other}"] = unanswered.astype(np.float64)
            if judge.kind == REWARDS:
                outcomes[f"reward.{name}"] = scores[:, 0].astype(np.float64)
        if judge.kind == REWARDS and not opponents:
            alone = (responses[0][:, None], responses[1][:, None])
            outcomes[f"reward.{name}"] = judge_scores(judge, batching, (*asked, *alone))[:, 0].astype(np.float64)
    return outcomes


def diverged(
    policy: Policy, params: Any, reference: Any, batching: Batching, prompts: PreferenceBatch, responses: Responses
) -> Outcomes:
    """KL to the reference in nats, for the first prompts: one for each response."""
    count = len(responses[0])
    asked = (prompts.prompts[:count], prompts.prompt_lengths[:count])
    answered = (responses[0][:, None], responses[1][:, None])
    divergence = functools.partial(make_divergence(policy, batching.mesh), params, reference)
    return {"kl": batching.run(divergence, (*asked, *answered))}


def classified(policy: Policy, params: Any, reference: Any, batching: Batching, pairs: PreferenceBatch) -> Outcomes:
    """How a policy classifies labelled pairs, and its log-ratios to the reference; see `classification`."""
    texts = (pairs.prompts, pairs.prompt_lengths, pairs.responses, pairs.response_lengths)
    score = make_score(policy, batching.mesh)
    ours, theirs = (batching.run(functools.partial(score, each), texts) for each in (params, reference))
    return classification(ours, theirs, np.asarray(pairs.scores))


def classified_own(
    policy: Policy,
    params: Any,
    reference: Any,
    judge: Judge,
    batching: Batching,
    prompts: PreferenceBatch,
    samples: tuple[Responses, Responses],
) -> Outcomes:
    """How a policy classifies pairs of its own samples, labelled by a judge, for the first prompts, as accuracy.own.

    The value is nan if the judge gave no answer for a pair.
    """
    count = len(samples[0][0])
    asked = prompts.prompts[:count], prompts.prompt_lengths[:count]
    answered: tuple[Any, Any] = _side_by_side(*samples)
    scores = judge_scores(judge, batching, (*asked, *answered))
    pairs = PreferenceBatch(prompts.prompt_ids[:count], *asked, *answered, scores=scores)
    accuracy = classified(policy, params, reference, batching, pairs)["accuracy"]
    return {"accuracy.own": np.where(np.isnan(scores).any(axis=1), np.nan, accuracy)}


def agreed(
    judge: Judge, others: Mapping[str, Judge], batching: Batching, pairs: PreferenceBatch, labels: str
) -> Outcomes:
    """How often a judge agrees with the labels, as accuracy, and with other judges, as agreement.OTHER.

    A pair counts 1 if both prefer the same response, 0 if they prefer different ones, and one half if one of them, or
    both, are undecided; the accuracy of a policy has the same rule. If a judge gave no answer for a pair, the value is
    nan. `labels` is the kind of the pairs' scores, like `Judge.kind`.
    """
    texts = (pairs.prompts, pairs.prompt_lengths, pairs.responses, pairs.response_lengths)

    def side(scores: np.ndarray, kind: str) -> np.ndarray:
        return np.sign(preferences(scores, kind) - 0.5)

    def asked(each: Judge) -> np.ndarray:
        return side(judge_scores(each, batching, texts), each.kind)

    own = asked(judge)
    compared = {"accuracy": side(np.asarray(pairs.scores), labels)}
    compared |= {f"agreement.{name}": asked(other) for name, other in others.items()}
    return {name: (1 + own * theirs) / 2 for name, theirs in compared.items()}


def _side_by_side(first: Responses, second: Responses) -> tuple[np.ndarray, np.ndarray]:
    """Two responses to each prompt: [N, 2, R] and [N, 2]."""
    width = max(first[0].shape[1], second[0].shape[1])
    padded = (np.pad(tokens, ((0, 0), (0, width - tokens.shape[1]))) for tokens, _ in (first, second))
    return np.stack([*padded], axis=1), np.stack([first[1], second[1]], axis=1)
