"""Encodes a pair's text as token ids within length limits; decides the split by the prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from alignment_gap import checks
from alignment_gap.data.text.pair import BadPair, Dropped, TextPair, named
from alignment_gap.data.text.source import POLICIES, TextSourceConfig, refuse_or_drop
from alignment_gap.data.text.vocabulary import EncodingError, Vocabulary

KEEP_END = "keep_end"


@dataclasses.dataclass(frozen=True)
class Limits:
    """Maximum tokens of prompts and responses, and how longer ones are treated.

    Attributes:
      prompt_length: maximum tokens of a prompt, including the begin and end ids.
      response_length: maximum tokens of a response, including the end id.
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
    """A pair as token ids: prompt int32[P], K responses int32[R_k] with the end id, scores float32[K]."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    scores: np.ndarray
    prompt_was_cut: bool = False


def encode_pair(
    pair: TextPair,
    vocabulary: Vocabulary,
    limits: Limits,
    *,
    bad_pairs: str = TextSourceConfig.bad_pairs,
    end_prompts: bool | None = None,
) -> Encoded | Dropped:
    """Token ids of a pair, or why it is dropped.

    Args:
      pair: the texts.
      vocabulary: encodes the texts.
      limits: maximum lengths.
      bad_pairs: refuse or drop an unusable pair.
      end_prompts: see `prompt_ids`.

    Raises:
      UserError: the pair is unusable or too long, and the settings say to refuse such pairs.
    """
    prompt_field, *fields = pair.fields
    try:
        prompt = _prompt_ids(pair.prompt, prompt_field, vocabulary, end_prompts)
        responses = [_response_ids(*text, vocabulary) for text in zip(pair.responses, fields, strict=True)]
        if len({tuple(response) for response in responses}) < len(responses):
            raise BadPair(f"identical pair {named(fields)}", "remove it, because its responses have the same tokens")
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
        np.array(_within(prompt, vocabulary, limits), np.int32),
        tuple(np.array(response, np.int32) for response in responses),
        np.array(pair.scores, np.float32),
        over,
    )


def held_out(prompt: bytes, fraction: float, seed: int = 0) -> bool:
    """Whether a prompt is among the `fraction` for validation; depends only on its bytes and the seed."""
    digest = hashlib.sha256(b"%d:" % seed + prompt).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def prompt_ids(text: str, vocabulary: Vocabulary, end_prompts: bool | None = None) -> list[int]:
    """Ids of a prompt, with the begin id if the vocabulary has one, and with the end id if prompts end with it.

    Args:
      text: the prompt; it may already have begin and end marks from a chat template.
      vocabulary: encodes the prompt.
      end_prompts: whether prompts end with the end id; None for `vocabulary.ends_prompts`.

    Raises:
      EncodingError: the vocabulary cannot express the text.
    """
    ids, begin = vocabulary.encode(text), vocabulary.bos_id
    ids = ids if begin is None or ids[:1] == [begin] else [begin, *ids]
    ends = vocabulary.ends_prompts if end_prompts is None else end_prompts
    return [*ids, vocabulary.eos_id] if ends and ids[-1:] != [vocabulary.eos_id] else ids


def prompt_within(text: str, vocabulary: Vocabulary, limits: Limits, end_prompts: bool | None = None) -> np.ndarray:
    """The prompt's ids int32[P] as in an encoded pair; all ids if the prompt is too long and must not be cut."""
    return np.array(_within(prompt_ids(text, vocabulary, end_prompts), vocabulary, limits), np.int32)


def _prompt_ids(text: str, field: str, vocabulary: Vocabulary, end_prompts: bool | None) -> list[int]:
    with _telling(field):
        ids = prompt_ids(text, vocabulary, end_prompts)
    if {*ids} <= {vocabulary.bos_id, vocabulary.eos_id}:
        raise BadPair(f"empty prompt {named([field])}", "write what the human says, because the text has no tokens")
    return ids


def _response_ids(text: str, field: str, vocabulary: Vocabulary) -> list[int]:
    """Ids up to and including the end id; a chat template may have written it already, with a newline after it."""
    with _telling(field):
        ids = vocabulary.encode(text)
    if vocabulary.eos_id in ids:
        end = ids.index(vocabulary.eos_id)
        # `decode` stops at an end id, so a text behind another end mark would not be seen.
        rest = [each for each in ids[end + 1 :] if each != vocabulary.eos_id]
        if vocabulary.decode(rest).strip():
            raise BadPair(f"end mark within a response {named([field])}", "remove the mark from the text")
        ids = ids[:end]
    if not ids:
        raise BadPair(f"empty response {named([field])}", "remove the pair, because the text has no tokens")
    return [*ids, vocabulary.eos_id]


@contextlib.contextmanager
def _telling(field: str) -> Iterator[None]:
    """Adds the field's name if its text cannot be encoded."""
    try:
        yield
    except EncodingError as error:
        raise BadPair(f"text that the vocabulary cannot express {named([field])}", str(error)) from None


def _within(prompt: list[int], vocabulary: Vocabulary, limits: Limits) -> list[int]:
    """Cuts a prompt that is too long to its last ids, if it may be cut; the begin id, if any, stays the first."""
    length = limits.prompt_length
    if len(prompt) <= length or limits.long_prompts != KEEP_END:
        return prompt
    if prompt[0] != vocabulary.bos_id:
        return prompt[-length:]
    return [prompt[0], *prompt[len(prompt) - length + 1 :]]
