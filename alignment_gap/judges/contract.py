"""The contract of all judges: scores of K responses to each prompt. A win rate asks a judge about two responses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from alignment_gap import checks
from alignment_gap.data.batches import check_token_ids
from alignment_gap.errors import UserError
from alignment_gap.sampling import Begin, Scores

LABELS = ("hard", "soft", "rewards")
PROBABILITIES, REWARDS = "probabilities", "rewards"
# What names a judge, in errors.
FORMS = "the folder of a preference model, rubric, module:function or URL#MODEL"


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """The judge that decides which response is better.

    Attributes:
      judge: the folder of a preference model's run, "rubric" (true quality in the built-in task), "module:function", or
        a language model: URL#MODEL, or a .json file with its settings.
      step: step of the run's checkpoint; None for the last.
      labels: "hard" (a pair has a winner, or a tie), "soft" (probabilities) or "rewards" (a number for each response).
    """

    judge: str | None = None
    step: int | None = None
    labels: str = "hard"

    def __post_init__(self) -> None:
        """Raises UserError if a setting is unknown or out of its range."""
        checks.at_least(self, 0, "step")
        checks.one_of(self, LABELS, "labels")


class Judge(NamedTuple):
    """A judge that is ready to score responses.

    Attributes:
      scores: (prompts [B, P], prompt_lengths [B], responses [B, K, R], response_lengths [B, K]) -> float32 [B, K]. The
        arrays are on the devices, sharded like batches.
      kind: what the scores are: "probabilities", each the mean preference for a response over the others; or "rewards".
      facts: the judge's name and digest, as JSON values, for the card of a dataset that it labels.
      begin: as `scores`, for a judge on other machines: sends the questions, and returns a function that waits for the
        scores. The scores of a prompt are nan if the judge gave no answer. None for a judge that answers at once.
      counts: the questions, answers and costs since the last call, over all processes, by the names of metrics. Every
        process must call it.
      vocabulary_size: rows of the embedding of a network; None for a judge on the host, which takes any token id.
    """

    scores: Scores
    kind: str
    facts: Mapping[str, str]
    begin: Begin | None = None
    counts: Callable[[], Mapping[str, float]] = dict
    vocabulary_size: int | None = None

    def check(self, *tokens: Any) -> None:
        """Raises UserError if a token id is outside the judge's vocabulary; the tokens are on the host."""
        if self.vocabulary_size is not None:
            check_token_ids("a text", f"the judge {self.facts['judge']}", self.vocabulary_size, *tokens)


@jax.jit
def shares_of_wins(rewards: Float[Array, "B K"]) -> Float[Array, "B K"]:
    """The share of the other responses that each response beats; a response with an equal reward counts half.

    Raises:
      UserError: there is one response per prompt, so there is nothing to compare.
    """
    return over_the_others((jnp.sign(rewards[:, :, None] - rewards[:, None, :]) + 1) / 2)


def over_the_others(preferences: Any) -> Any:
    """The mean preference [B, K] for each response over the others, from preferences [B, K, K] with a diagonal of 0.5.

    Raises:
      UserError: there is one response per prompt, so there is nothing to compare.
    """
    samples = preferences.shape[1]
    if samples < 2:
        raise UserError(f"{samples} response a prompt: a preference needs 2 or more")
    return (preferences.sum(axis=2) - 0.5) / (samples - 1)
