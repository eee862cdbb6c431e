"""Hugging Face tokenizers: a checkpoint's `tokenizer.json` and the files beside it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

from alignment_gap.data.text.vocabulary import decoded_ids
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at

_CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")


class TokenizerVocabulary:
    """A `tokenizer.json`, through the `tokenizers` library.

    `tokenizer_config.json` or `special_tokens_map.json` beside it names the special tokens. A vocabulary without a
    padding token pads with the end id; this is harmless, because masks come from lengths. Prompts begin with the begin
    token, and end with the end token, if the tokenizer's own post-processing adds it.
    """

    def __init__(self, path: str | AnyPath):
        """Raises UserError if `path` is missing, is not a tokenizer, or has no end token."""
        self.path = at(path)
        content = self._read()
        self._tokenizer = _parse(content, self.path)
        named = _special_tokens(self.path.parent)
        self.eos_id = self._required(named, "eos_token")
        pad = self._id(named.get("pad_token"))
        self.pad_id = self.eos_id if pad is None else pad
        self.unk_id = self._id(named.get("unk_token"))
        bos = self._id(named.get("bos_token"))
        self.bos_id = bos if bos in self._tokenizer.encode("", add_special_tokens=True).ids[:1] else None
        # Tested with a text, because the end id may also be the begin id.
        self.ends_prompts = self._tokenizer.encode("a", add_special_tokens=True).ids[-1:] == [self.eos_id]
        self.size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.extra_ids = self._count_sentinels()
        settings = json.dumps([self.eos_id, self.pad_id, self.bos_id])
        self.digest = hashlib.sha256(hashlib.sha256(content).digest() + settings.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without begin and end ids; the text of a special token becomes that token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[SupportsIndex], past_ends: bool = False) -> str:
        """The text of `ids` up to the first end id; special tokens are shown, ids out of range as `<no_token_i>`."""
        kept = decoded_ids(ids, self.eos_id, past_ends)
        parts: list[str] = []
        for is_token, run in itertools.groupby(kept, key=lambda i: 0 <= i < self.size):
            if is_token:
                parts.append(self._tokenizer.decode(list(run), skip_special_tokens=False))
            else:
                parts.extend(f"<no_token_{i}>" for i in run)
        return "".join(parts)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def _required(self, named: Mapping[str, str], name: str) -> int:
        index = self._id(named.get(name))
        if index is None:
            raise UserError(
                f"{self.path} has no {name}: put the checkpoint's {' or '.join(_CONFIGS)} beside it, which names it"
            )
        return index

    def _count_sentinels(self) -> int:
        """How many of the last ids are T5's `<extra_id_i>`, counted from the end."""
        names = (self._tokenizer.id_to_token(self.size - 1 - i) for i in range(self.size))
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[1] == f"<extra_id_{pair[0]}>", enumerate(names)))

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the vocabulary {self.path} ({error.strerror}): give a tokenizer.json"
            ) from None


def _parse(content: bytes, path: AnyPath) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError('tokenizers is not installed: pip install "alignment-gap[huggingface]"') from None
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # The library raises Exception itself.
        raise UserError(f"{path} is not a tokenizer ({str(error)[:80]}): give a checkpoint's tokenizer.json") from None
    # A file may contain maximum lengths from training; texts are never cut or padded here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(folder: AnyPath) -> dict[str, str]:
    """The special tokens, such as {"eos_token": "</s>"}; later files of `_CONFIGS` win."""
    named: dict[str, str] = {}
    for name in _CONFIGS:
        if not (folder / name).exists():
            continue
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{folder / name} is not JSON ({error}): fetch the file again") from None
        if not isinstance(values, Mapping):
            raise UserError(f"{folder / name} holds no JSON object: fetch the file again")
        for key, value in values.items():
            token = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(token, str):
                named[key] = token
    return named
