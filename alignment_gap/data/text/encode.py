"""From a pair's text to token ids within lengths, and the split by prompt."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from alignment_gap import checks
from alignment_gap.data.text.pair import BadPair, Dropped, TextPair, named
from alignment_gap.data.text.source import POLICIES, TextSourceConfig, refuse_or_drop
from alignment_gap.data.text.vocabulary import EncodingError, Vocabulary

KEEP_END = "keep_end"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most tokens of prompts and responses, and what becomes of longer ones.

    Attributes:
      prompt_length: most tokens of a prompt, the begin id included.
      response_length: most tokens of a response, the end id included.
      long_prompts: drop or refuse longer prompts, or keep_end: keep their last tokens.
      long_responses: drop or refuse longer responses; a response is never cut.
    """

    prompt_length: int = 512
    response_length: int = 256
    long_prompts: str = "drop"
    long_responses: str = "drop"

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "prompt_length", "response_length")
        checks.one_of(self, (*POLICIES, KEEP_END), "long_prompts")
        checks.one_of(self, POLICIES, "long_responses")


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A pair's token ids: int32[P], K of int32[R_k] with the end id, float32[K], and whether the prompt was cut."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    scores: np.ndarray
    prompt_was_cut: bool = False


def encode_pair(
    pair: TextPair, vocabulary: Vocabulary, limits: Limits, *, bad_pairs: str = TextSourceConfig.bad_pairs
) -> Encoded | Dropped:
    """Token ids of a pair, or why there are none.

    Raises:
      UserError: the pair is unusable or too long, and the policy of that is to refuse.
    """
    prompt_field, *fields = pair.fields
    try:
        prompt = _prompt_ids(pair.prompt, prompt_field, vocabulary)
        responses = [_response_ids(*text, vocabulary) for text in zip(pair.responses, fields, strict=True)]
        if len({tuple(response) for response in responses}) < len(responses):
            raise BadPair(f"identical pair {named(fields)}", "remove it, its responses have the same tokens")
    except BadPair as problem:
        return refuse_or_drop(problem, pair.where, "bad_pairs", bad_pairs)
    longest = max(map(len, responses))
    over = len(prompt) > limits.prompt_length
    if over and limits.long_prompts != KEEP_END:
        size = f"{len(prompt)} tokens in the field {prompt_field!r}"
        long = BadPair(f"long prompt ({size}, over prompt_length={limits.prompt_length})", "raise --prompt_length")
        return refuse_or_drop(long, pair.where, "long_prompts", limits.long_prompts)
    if longest > limits.response_length:
        size = f"{longest} tokens in the field {fields[list(map(len, responses)).index(longest)]!r}"
        long = BadPair(
            f"long response ({size}, over response_length={limits.response_length})", "raise --response_length"
        )
        return refuse_or_drop(long, pair.where, "long_responses", limits.long_responses)
    return Encoded(
        np.array(_end_of(prompt, vocabulary, limits.prompt_length) if over else prompt, np.int32),
        tuple(np.array(response, np.int32) for response in responses),
        np.array(pair.scores, np.float32),
        over,
    )


def held_out(prompt: bytes, fraction: float, seed: int = 0) -> bool:
    """Whether a prompt is among the `fraction` that is for validation; depends on its bytes and the seed alone."""
    digest = hashlib.sha256(b"%d:" % seed + prompt).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _prompt_ids(text: str, field: str, vocabulary: Vocabulary) -> list[int]:
    ids = _ids(text, field, vocabulary)
    begin = vocabulary.bos_id
    # A chat template may have written the begin mark itself.
    return ids if begin is None or ids[:1] == [begin] else [begin, *ids]


def _response_ids(text: str, field: str, vocabulary: Vocabulary) -> list[int]:
    """Ids up to and with one end id; a chat template may have written it, and a line's end after it."""
    ids = _ids(text, field, vocabulary)
    if vocabulary.eos_id in ids:
        end = ids.index(vocabulary.eos_id)
        if vocabulary.decode(ids[end + 1 :]).strip():
            raise BadPair(f"end mark within a response {named([field])}", "remove the mark from the text")
        ids = ids[:end]
    return [*ids, vocabulary.eos_id]


def _ids(text: str, field: str, vocabulary: Vocabulary) -> list[int]:
    try:
        return vocabulary.encode(text)
    except EncodingError as error:
        raise BadPair(f"text that the vocabulary cannot express {named([field])}", str(error)) from None


def _end_of(prompt: list[int], vocabulary: Vocabulary, length: int) -> list[int]:
    """The last `length` ids, of which the first is the begin id where there is one."""
    if prompt[0] != vocabulary.bos_id:
        return prompt[-length:]
    return [prompt[0], *prompt[len(prompt) - length + 1 :]]
