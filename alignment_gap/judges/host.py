"""Judges on the host: each process asks about its own rows of a batch, as lists of token ids."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

from alignment_gap.data.text.vocabulary import Vocabulary
from alignment_gap.errors import UserError
from alignment_gap.judges.contract import PROBABILITIES, REWARDS, Judge, JudgeConfig, shares_of_wins
from alignment_gap.sampling import Scores
from alignment_gap.sharding import LogicalMesh, own_rows, put_batch

# (N prompts, K responses to each), as token ids without padding -> N rows of K rewards.
Rewards = Callable[[list[list[int]], list[list[list[int]]]], object]


def host_judge(rewards: Rewards, config: JudgeConfig, mesh: LogicalMesh, facts: dict[str, str]) -> Judge:
    """A judge from a function that returns rewards on the host; hard labels compare the rewards.

    Raises:
      UserError: the config asks for soft labels, but the function gives rewards.
    """
    if config.labels == "soft":
        raise UserError(f"labels is 'soft', but {config.judge} gives rewards: choose hard or rewards")
    scores = _on_host(rewards, str(config.judge), mesh)
    if config.labels == REWARDS:
        return Judge(scores, REWARDS, facts)
    return Judge(lambda *texts: shares_of_wins(scores(*texts)), PROBABILITIES, facts)


def _on_host(rewards: Rewards, name: str, mesh: LogicalMesh) -> Scores:
    def scores(*texts: Array) -> Float[Array, "B K"]:
        prompts, responses = own_texts(*texts)
        with jax.transfer_guard("allow"):  # The function may compute with jax itself.
            given = rewards(prompts, responses)
        try:
            found = np.asarray(given, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the judge {name} did not give rows of numbers ({error}): it must give one number for each response"
            ) from error
        asked = (len(responses), texts[-1].shape[1])
        if found.shape != asked:
            raise UserError(
                f"the judge {name} gave rewards of shape {found.shape} for {asked[0]} prompts with {asked[1]} "
                "responses each: it must give one number for each response"
            )
        if not np.isfinite(found).all():
            raise UserError(f"the judge {name} gave {found[~np.isfinite(found)][0]}: rewards must be finite")
        return put_batch(found, mesh, len(texts[0]))

    return scores


def decoded(
    vocabulary: Vocabulary, prompts: list[list[int]], responses: list[list[list[int]]]
) -> tuple[list[str], list[list[str]]]:
    """The texts of prompts and responses: a whole chat as prompt, and a response up to its first end id."""
    questions = [vocabulary.decode(prompt, past_ends=True) for prompt in prompts]
    return questions, [[*map(vocabulary.decode, each)] for each in responses]


def own_texts(
    prompts: Array, prompt_lengths: Array, responses: Array, lengths: Array
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """This process's rows of a batch: prompts and their responses, as token ids without padding."""
    prompts, prompt_lengths, responses, lengths = own_rows((prompts, prompt_lengths, responses, lengths))
    questions = [row[:length].tolist() for row, length in zip(prompts, prompt_lengths, strict=True)]
    answers = [
        [row[:length].tolist() for row, length in zip(*each, strict=True)]
        for each in zip(responses, lengths, strict=True)
    ]
    return questions, answers
