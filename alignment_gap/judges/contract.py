"""One contract for all judges: scores of K responses to each prompt. A win rate is a judge asked about two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignment_gap import checks
from alignment_gap.errors import UserError
from alignment_gap.sampling import Begin, Scores

LABELS = ("hard", "soft", "rewards")
PROBABILITIES, REWARDS = "probabilities", "rewards"


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Who says which response is better.

    Attributes:
      judge: the folder of a preference model's run, "rubric" (true quality in the built-in task), "module:function", or
        a language model: URL#MODEL, or a .json file with its settings.
      step: which checkpoint of the run; None for the last.
      labels: "hard" (a pair has a winner, or a tie), "soft" (probabilities) or "rewards" (a number for each response).
    """

    judge: str | None = None
    step: int | None = None
    labels: str = "hard"

    def __post_init__(self) -> None:
        """Raises UserError where a setting is unknown or out of its range."""
        checks.at_least(self, 0, "step")
        checks.one_of(self, LABELS, "labels")


class Judge(NamedTuple):
    """A judge that can be asked.

    Attributes:
      scores: (prompts [B, P], prompt_lengths [B], responses [B, K, R], response_lengths [B, K]) -> float32 [B, K]. The
        arrays are on the devices, laid out as batches are.
      kind: what the scores are: "probabilities", each the mean preference for a response over the others; or "rewards".
      facts: what the judge is, as JSON values: for the card of what it labels.
      begin: as `scores`, for a judge that other machines compute: begins to ask, and returns what waits for the scores.
        The scores of a prompt are nan where it gave no answer. None for a judge that always answers at once.
      counts: what was asked and what it took since the last call, over all processes, by the names of metrics. Every
        process calls it.
    """

    scores: Scores
    kind: str
    facts: Mapping[str, str]
    begin: Begin | None = None
    counts: Callable[[], Mapping[str, float]] = dict


@jax.jit
def shares_of_wins(rewards: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """The share of the other responses that each response beats; an equal one counts half.

    Raises:
      UserError: there is one response a prompt, so there is no other to compare it with.
    """
    return over_the_others((jnp.sign(rewards[:, :, None] - rewards[:, None, :]) + 1) / 2)


def over_the_others(preferences: Any) -> Any:
    """The mean preference [B, K] for each response over the others, from preferences [B, K, K], with 0.5 for itself.

    Raises:
      UserError: there is one response a prompt, so there is no other to compare it with.
    """
    samples = preferences.shape[1]
    if samples < 2:
        raise UserError(f"{samples} response a prompt: a preference needs 2 or more")
    return (preferences.sum(axis=2) - 0.5) / (samples - 1)
