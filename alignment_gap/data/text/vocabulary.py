"""Vocabularies: text to token ids and back, with explicit pad, end and sentinel ids."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import sentencepiece

from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at

BYTES = "bytes"
POSTS = "posts"
KINDS = 'a SentencePiece *.model, a tokenizer.json, a word list *.txt, a folder with one of them, "bytes" or "posts"'


class EncodingError(UserError):
    """A text that a vocabulary cannot express."""


@runtime_checkable
class Vocabulary(Protocol):
    """The interface of a tokenizer.

    Sentinels (T5's extra ids) are the last `extra_ids` of the `size` ids, counted from the end.
    """

    @property
    def size(self) -> int:
        """Number of ids, including sentinels."""

    @property
    def pad_id(self) -> int:
        """The id that fills unused positions."""

    @property
    def eos_id(self) -> int:
        """The id that ends a text."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins every prompt; None if prompts begin with their text."""

    @property
    def unk_id(self) -> int | None:
        """The id of unknown tokens; None for a vocabulary without one."""

    @property
    def ends_prompts(self) -> bool:
        """Whether prompts end with the end id too, as T5, mT5 and ByT5 expect."""

    @property
    def extra_ids(self) -> int:
        """Number of sentinels."""

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that determines how text is encoded."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end id; raises EncodingError if `text` cannot be expressed."""

    def decode(self, ids: Iterable[SupportsIndex], past_ends: bool = False) -> str:
        """The text of `ids` up to the first end id; sentinels read `<extra_id_i>`, ids out of range `<no_token_i>`.

        With `past_ends` it is the text of all ids, without an end id at their end: a chat template may end each turn of
        a prompt with the end id.
        """


def decoded_ids(ids: Iterable[SupportsIndex], eos_id: int, past_ends: bool) -> list[int]:
    """The ids whose text a vocabulary's `decode` returns."""
    found = [int(i) for i in ids]
    if past_ends:
        return found[:-1] if found[-1:] == [eos_id] else found
    return [*itertools.takewhile(lambda i: i != eos_id, found)]


def extra_id(vocabulary: Vocabulary, index: int) -> int:
    """Id of sentinel `index`, T5's `<extra_id_index>`; raises UserError if there are fewer."""
    if not 0 <= index < vocabulary.extra_ids:
        raise UserError(
            f"sentinel {index} is not among the vocabulary's {vocabulary.extra_ids}: build it with more extra_ids"
        )
    return vocabulary.size - 1 - index


class WordVocabulary:
    """Whole words separated by spaces, from a closed list: pad 0, end 1, the words, then the sentinels.

    There is no unknown id: a word outside the list raises EncodingError.
    """

    pad_id = 0
    eos_id = 1
    bos_id = None
    unk_id = None
    ends_prompts = False

    def __init__(self, words: Sequence[str], extra_ids: int = 8):
        """Raises UserError if a word is empty, contains a space, or occurs twice."""
        self.words = tuple(words)
        self.extra_ids = extra_ids
        self.size = 2 + len(self.words) + extra_ids
        for word in self.words:
            if word.split() != [word]:
                raise UserError(f"{word!r} is not a word: words must not be empty, and must not contain spaces")
        self._id_of = {word: index for index, word in enumerate(self.words, start=2)}
        if len(self._id_of) != len(self.words):
            twice = next(word for index, word in enumerate(self.words) if word in self.words[:index])
            raise UserError(f"word {twice!r} comes twice in the vocabulary: keep one of them")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 in hexadecimal of the words and the number of sentinels."""
        return hashlib.sha256(json.dumps(["words", self.words, self.extra_ids]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of the words of `text`, without an end id; raises EncodingError that names an unknown word."""
        try:
            return [self._id_of[word] for word in text.split()]
        except KeyError as error:
            raise EncodingError(
                f"word {error.args[0]!r} is not among the {len(self.words)} words of the vocabulary: "
                "use its words or another vocabulary"
            ) from None

    def decode(self, ids: Iterable[SupportsIndex], past_ends: bool = False) -> str:
        """The words of `ids` up to the first end id; `<pad>`, `<eos>` and `<extra_id_i>` for ids that are not words."""
        return " ".join(map(self._name, decoded_ids(ids, self.eos_id, past_ends)))

    def _name(self, index: int) -> str:
        if index < 2:
            return "<eos>" if index == self.eos_id else "<pad>"
        if index < 2 + len(self.words):
            return self.words[index - 2]
        return _extra_name(self.size, self.extra_ids, index)


class ByteVocabulary:
    """UTF-8 bytes with ByT5's ids: pad 0, end 1, unknown 2, the 256 bytes from 3, then 125 sentinels."""

    pad_id = 0
    eos_id = 1
    unk_id = 2
    bos_id = None
    ends_prompts = True
    extra_ids = 125
    size = 3 + 256 + 125
    digest = hashlib.sha256(b"ByT5 bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of `text` plus 3, without an end id."""
        return [byte + 3 for byte in text.encode("utf-8")]

    def decode(self, ids: Iterable[SupportsIndex], past_ends: bool = False) -> str:
        """The text of `ids` up to the first end id; invalid UTF-8 becomes the replacement character."""
        kept = decoded_ids(ids, self.eos_id, past_ends)
        parts: list[str] = []
        for is_byte, run in itertools.groupby(kept, key=lambda i: 3 <= i < 259):
            if is_byte:
                parts.append(bytes(i - 3 for i in run).decode("utf-8", errors="replace"))
            else:
                names = {self.pad_id: "<pad>", self.eos_id: "<eos>", self.unk_id: "<unk>"}
                parts.extend(names.get(i) or _extra_name(self.size, self.extra_ids, i) for i in run)
        return "".join(parts)


class SentencePieceVocabulary:
    """A SentencePiece model with its own special ids, then `extra_ids` sentinels; T5 adds 100, Gemma none.

    If the model has a begin id, as Gemma has, prompts begin with it. T5 and mT5 have none; their prompts end with the
    end id.
    """

    def __init__(self, path: str | AnyPath, extra_ids: int | None = None):
        """By default, `extra_ids` is 100 for a model without a begin id, as in T5, and otherwise 0.

        Raises UserError if `path` is missing, is not a SentencePiece model, or has no pad or end id."""
        self.path = at(path)
        content = read_bytes(self.path)
        self._model = _parse_model(content, self.path)
        self.pad_id = self._special("pad", self._model.pad_id())
        self.eos_id = self._special("eos", self._model.eos_id())
        self.bos_id: int | None = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.unk_id: int = self._model.unk_id()
        self.ends_prompts = self.bos_id is None
        self.extra_ids = extra_ids if extra_ids is not None else 100 if self.bos_id is None else 0
        self._pieces: int = self._model.vocab_size()
        self.size = self._pieces + self.extra_ids
        self.digest = hashlib.sha256(hashlib.sha256(content).digest() + str(self.extra_ids).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Piece ids of `text`, without an end id; raises EncodingError if the whole text is unknown."""
        ids: list[int] = self._model.encode(text)
        if self.unk_id in ids and not self.decode(i for i in ids if i != self.unk_id).strip():
            raise EncodingError(
                f"{self.path} has no piece for any of {text[:40]!r}: use a vocabulary made for this language"
            )
        return ids

    def decode(self, ids: Iterable[SupportsIndex], past_ends: bool = False) -> str:
        """The text of `ids` up to the first end id; sentinels read `<extra_id_i>`."""
        kept = decoded_ids(ids, self.eos_id, past_ends)
        parts: list[str] = []
        for is_piece, run in itertools.groupby(kept, key=lambda i: 0 <= i < self._pieces):
            if is_piece:
                parts.append(self._model.decode(list(run)))
            else:
                parts.extend(_extra_name(self.size, self.extra_ids, i) for i in run)
        return " ".join(part for part in parts if part)

    def _special(self, name: str, index: int) -> int:
        if index < 0:
            raise UserError(f"{self.path} has no {name} id: train it with {name}_id set, as for T5")
        return index


def read_bytes(path: AnyPath) -> bytes:
    """The bytes of a vocabulary's file; raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path} ({error.strerror}): give {KINDS}") from None


def _parse_model(content: bytes, path: AnyPath) -> sentencepiece.SentencePieceProcessor:
    problem = UserError(f"{path} is not a SentencePiece model: give one, such as T5's spiece.model")
    if not content:
        raise problem
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError:
        raise problem from None


def _extra_name(size: int, extra_ids: int, index: int) -> str:
    """The text for an id without text; a model may have more ids than its vocabulary."""
    if not size - extra_ids <= index < size:
        return f"<no_token_{index}>"
    return f"<extra_id_{size - 1 - index}>"
