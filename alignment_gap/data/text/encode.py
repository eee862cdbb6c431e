"""From a pair's text to token ids within lengths, and the split by prompt."""

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
    """Most tokens of prompts and responses, and what becomes of longer ones.

    Attributes:
      prompt_length: most tokens of a prompt, the begin and the end id included.
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
    pair: TextPair,
    vocabulary: Vocabulary,
    limits: Limits,
    *,
    bad_pairs: str = TextSourceConfig.bad_pairs,
    end_prompts: bool | None = None,
) -> Encoded | Dropped:
    """Token ids of a pair, or why there are none.

    Args:
      pair: the texts.
      vocabulary: encodes them.
      limits: most tokens of each.
      bad_pairs: refuse or drop an unusable pair.
      end_prompts: see `prompt_ids`.

    Raises:
      UserError: the pair is unusable or too long, and the policy of that is to refuse.
    """
    prompt_field, *fields = pair.fields
    try:
        prompt = _prompt_ids(pair.prompt, prompt_field, vocabulary, end_prompts)
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
        np.array(_within(prompt, vocabulary, limits), np.int32),
        tuple(np.array(response, np.int32) for response in responses),
        np.array(pair.scores, np.float32),
        over,
    )


def held_out(prompt: bytes, fraction: float, seed: int = 0) -> bool:
    """Whether a prompt is among the `fraction` that is for validation; depends on its bytes and the seed alone."""
    digest = hashlib.sha256(b"%d:" % seed + prompt).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def prompt_ids(text: str, vocabulary: Vocabulary, end_prompts: bool | None = None) -> list[int]:
    """Ids of a prompt, with the begin id where the vocabulary has one, and with the end id where it is asked for.

    Args:
      text: the prompt; a chat template may have written the begin and the end mark itself.
      vocabulary: encodes it.
      end_prompts: whether prompts end with the end id; None for what the vocabulary's models are used to.

    Raises:
      EncodingError: the vocabulary cannot express the text.
    """
    ids, begin = vocabulary.encode(text), vocabulary.bos_id
    ids = ids if begin is None or ids[:1] == [begin] else [begin, *ids]
    ends = vocabulary.ends_prompts if end_prompts is None else end_prompts
    return [*ids, vocabulary.eos_id] if ends and ids[-1:] != [vocabulary.eos_id] else ids


def prompt_within(text: str, vocabulary: Vocabulary, limits: Limits, end_prompts: bool | None = None) -> np.ndarray:
    """The ids int32[P] that a pair with this prompt has; all of them where it is too long and may not be cut."""
    return np.array(_within(prompt_ids(text, vocabulary, end_prompts), vocabulary, limits), np.int32)


def _prompt_ids(text: str, field: str, vocabulary: Vocabulary, end_prompts: bool | None) -> list[int]:
    with _telling(field):
        return prompt_ids(text, vocabulary, end_prompts)


def _response_ids(text: str, field: str, vocabulary: Vocabulary) -> list[int]:
    """Ids up to and with one end id; a chat template may have written it, and a line's end after it."""
    with _telling(field):
        ids = vocabulary.encode(text)
    if vocabulary.eos_id in ids:
        end = ids.index(vocabulary.eos_id)
        if vocabulary.decode(ids[end + 1 :]).strip():
            raise BadPair(f"end mark within a response {named([field])}", "remove the mark from the text")
        ids = ids[:end]
    return [*ids, vocabulary.eos_id]


@contextlib.contextmanager
def _telling(field: str) -> Iterator[None]:
    """Tells of which field a text cannot be encoded."""
    try:
        yield
    except EncodingError as error:
        raise BadPair(f"text that the vocabulary cannot express {named([field])}", str(error)) from None


def _within(prompt: list[int], vocabulary: Vocabulary, limits: Limits) -> list[int]:
    """The last ids of a prompt that is too long and may be cut; the first is the begin id where there is one."""
    length = limits.prompt_length
    if len(prompt) <= length or limits.long_prompts != KEEP_END:
        return prompt
    if prompt[0] != vocabulary.bos_id:
        return prompt[-length:]
    return [prompt[0], *prompt[len(prompt) - length + 1 :]]
