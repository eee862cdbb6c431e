"""Human preference pairs in Anthropic HH's format: JSON lines of whole dialogues, `chosen` and `rejected`.

The prompt is the dialogue up to and with its last "Assistant:" turn mark, which both dialogues must share; the
responses are what follows.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from alignment_gap.data.records import Example
from alignment_gap.data.vocabulary import EncodingError, Vocabulary
from alignment_gap.errors import UserError

PROMPT_MARK = "\n\nAssistant:"
_HUMAN_MARK = "\n\nHuman:"
FIELDS = ("chosen", "rejected")
POLICIES = ("refuse", "drop")


@dataclasses.dataclass(frozen=True)
class DialoguePair:
    """Two responses to one prompt, as text, and the line that they came from."""

    prompt: str
    chosen: str
    rejected: str
    line: int


@dataclasses.dataclass(frozen=True)
class HumanPairs:
    """Encoded pairs and what was left out.

    Attributes:
      examples: the chosen response first, scores (1, 0); equal prompts have equal prompt ids.
      dropped: pairs that were left out, by reason.
    """

    examples: list[Example]
    dropped: Mapping[str, int]


class _BadPair(Exception):
    """A pair that may be dropped; its text is the reason, its second argument the remedy."""


class _Drops:
    """Refuses or counts what is unusable, each kind by its policy."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.counts: collections.Counter[str] = collections.Counter()

    def take(self, problem: _BadPair, line: int, policy: str, setting: str) -> None:
        reason, remedy = problem.args
        if policy == "refuse":
            raise UserError(f'{self.path}:{line}: {reason}: {remedy}, or set {setting}="drop"')
        self.counts[reason.split(" (")[0]] += 1


def read_human_pairs(
    path: str | os.PathLike[str],
    vocabulary: Vocabulary,
    *,
    prompt_length: int,
    response_length: int,
    bad_pairs: str = "refuse",
    long_pairs: str = "drop",
    limit: int | None = None,
) -> HumanPairs:
    """Reads and encodes the pairs of a `.jsonl` or `.jsonl.gz` file; responses end in the end id.

    Args:
      path: the file.
      vocabulary: encodes the texts.
      prompt_length: most tokens of a prompt.
      response_length: most tokens of a response, the end id included.
      bad_pairs: "refuse" or "drop" pairs that hold no preference: identical responses, an empty prompt or response,
        dialogues that do not share their prompt, a text that the vocabulary cannot express. What is not JSON, not
        UTF-8 or lacks a field is always refused.
      long_pairs: "refuse" or "drop" pairs over a length; nothing is cut.
      limit: pairs to keep, None for all; the rest of the file is not read.

    Raises:
      UserError: the file or a line is unusable, a setting is unknown, or no pair is left.
    """
    path = pathlib.Path(path)
    _check_settings(bad_pairs, long_pairs, prompt_length, response_length, limit)
    drops, numbers = _Drops(path), _PromptNumbers()
    examples: list[Example] = []
    lines = 0
    for line, chosen, rejected in read_dialogues(path):
        lines += 1
        try:
            encoded = _encode(split_dialogues(chosen, rejected, line), vocabulary)
        except _BadPair as problem:
            drops.take(problem, line, bad_pairs, "bad_pairs")
            continue
        try:
            _check_lengths(encoded, prompt_length, response_length)
        except _BadPair as problem:
            drops.take(problem, line, long_pairs, "long_pairs")
            continue
        examples.append(_example(encoded, numbers))
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: {_nothing_left(lines, drops.counts)}")
    return HumanPairs(examples, dict(sorted(drops.counts.items())))


def read_dialogues(path: str | os.PathLike[str]) -> Iterator[tuple[int, str, str]]:
    """Line number, chosen and rejected dialogue of every line that is not blank.

    Raises:
      UserError: the file is missing, empty or damaged, or a line is not a JSON object with both texts.
    """
    path = pathlib.Path(path)
    for number, line in _lines(path):
        if line.strip():
            chosen, rejected = _parse(line, path, number)
            yield number, chosen, rejected


def split_dialogues(chosen: str, rejected: str, line: int = 0) -> DialoguePair:
    """The prompt that both dialogues share and their two responses, stripped; raises where there is no preference."""
    prompts = [dialogue[: dialogue.rfind(PROMPT_MARK) + len(PROMPT_MARK)] for dialogue in (chosen, rejected)]
    if PROMPT_MARK not in chosen or PROMPT_MARK not in rejected:
        raise _BadPair("no prompt", 'each dialogue needs a "\\n\\nAssistant:" turn')
    if prompts[0] != prompts[1]:
        raise _BadPair("prompts differ", 'make both dialogues the same up to the last "\\n\\nAssistant:"')
    if not prompts[0].removesuffix(PROMPT_MARK).replace(_HUMAN_MARK, "").replace(PROMPT_MARK, "").strip():
        raise _BadPair("empty prompt", "write what the human says")
    first, second = (dialogue[len(prompts[0]) :].strip() for dialogue in (chosen, rejected))
    if first == second:
        raise _BadPair("identical pair", "remove it, it states no preference")
    if not first or not second:
        raise _BadPair("empty response", "remove the pair")
    return DialoguePair(prompts[0], first, second, line)


def split_by_prompt(examples: Sequence[Example], fraction: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, about `fraction` of the prompts in the latter, no prompt in both.

    Where a prompt goes depends on its tokens and the seed alone, not on what else there is.
    """
    training: list[Example] = []
    validation: list[Example] = []
    for example in examples:
        digest = hashlib.sha256(b"%d:" % seed + example.prompt.tobytes()).digest()
        held_out = int.from_bytes(digest[:8], "big") < fraction * 2**64
        (validation if held_out else training).append(example)
    return training, validation


class _PromptNumbers:
    """Numbers prompts in the order of their first appearance."""

    def __init__(self) -> None:
        self._number: dict[bytes, int] = {}

    def __call__(self, prompt: np.ndarray) -> int:
        return self._number.setdefault(prompt.tobytes(), len(self._number))


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip data after line {number} ({error}): fetch the file again") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give the path of a .jsonl or .jsonl.gz file") from None
    if not number:
        raise UserError(f"{path} is empty: give a file with a pair on each line")


def _parse(line: bytes, path: pathlib.Path, number: int) -> tuple[str, str]:
    where = f"{path}:{number}"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}): write one JSON object on each line") from None
    form = f'write {{"{FIELDS[0]}": "...", "{FIELDS[1]}": "..."}}'
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}, not an object: {form}")
    for field in FIELDS:
        if field not in record:
            raise UserError(f"{where}: lacks the field {field!r}: {form}")
        value = record[field]
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise UserError(f"{where}: the field {field!r} is {kind}, not a text: {form}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{where}: the field {field!r} holds half a surrogate pair: write whole characters")
    return record["chosen"], record["rejected"]


def _encode(pair: DialoguePair, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt, chosen and rejected as int32 ids."""
    try:
        ids = [vocabulary.encode(text) for text in (pair.prompt, pair.chosen, pair.rejected)]
    except EncodingError as error:
        raise _BadPair("text that the vocabulary cannot express", str(error)) from None
    prompt, chosen, rejected = ids
    if chosen == rejected:
        raise _BadPair("identical pair", "remove it, its responses have the same tokens")
    end = [vocabulary.eos_id]
    return np.array(prompt, np.int32), np.array(chosen + end, np.int32), np.array(rejected + end, np.int32)


def _check_lengths(
    encoded: tuple[np.ndarray, np.ndarray, np.ndarray], prompt_length: int, response_length: int
) -> None:
    prompt, chosen, rejected = map(len, encoded)
    if prompt > prompt_length:
        raise _BadPair(f"long prompt ({prompt} tokens, over prompt_length={prompt_length})", "raise prompt_length")
    longest = max(chosen, rejected)
    if longest > response_length:
        reason = f"long response ({longest} tokens, over response_length={response_length})"
        raise _BadPair(reason, "raise response_length")


def _example(encoded: tuple[np.ndarray, np.ndarray, np.ndarray], numbers: _PromptNumbers) -> Example:
    prompt, chosen, rejected = encoded
    return Example(numbers(prompt), prompt, (chosen, rejected), np.array([1, 0], np.float32))


def _check_settings(
    bad_pairs: str, long_pairs: str, prompt_length: int, response_length: int, limit: int | None
) -> None:
    for name, value in (("bad_pairs", bad_pairs), ("long_pairs", long_pairs)):
        if value not in POLICIES:
            raise UserError(f"{name}={value!r} is unknown: choose one of {', '.join(POLICIES)}")
    for name, number in (("prompt_length", prompt_length), ("response_length", response_length), ("limit", limit)):
        if number is not None and number < 1:
            raise UserError(f"{name}={number} is out of range: set it to 1 or more")


def _nothing_left(lines: int, counts: Mapping[str, int]) -> str:
    if not lines:
        return "no line holds a pair: give a file with a pair on each line"
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
    return f"none of {lines} pairs is left ({reasons}): raise the lengths or mend the file"
