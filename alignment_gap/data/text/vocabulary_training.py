"""Trains a SentencePiece vocabulary with T5's special ids on the user's own texts."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from alignment_gap.checks import nearest
from alignment_gap.data.text import Dropped, TextSourceConfig, open_source
from alignment_gap.data.text.vocabulary import SentencePieceVocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at, write_bytes

# SentencePiece silently drops longer lines, so they are split; it splits at spaces anyway.
_LONGEST = 4096
_MODELS = ("unigram", "bpe")


def train_vocabulary(
    texts: Iterable[str],
    output: str | AnyPath,
    size: int,
    *,
    model: str = "unigram",
    sentences: int = 1_000_000,
) -> SentencePieceVocabulary:
    """Trains a vocabulary and writes it to `output`; equal texts give equal bytes.

    Special ids are T5's: pad 0, end 1, unknown 2, and no begin id. A character that is not in the texts is encoded as
    bytes, so every text can be encoded.

    Args:
      texts: the training texts.
      output: the file to write, `*.model`.
      size: number of pieces, including special pieces and the 256 bytes.
      model: "unigram" or "bpe".
      sentences: maximum number of lines to train on, the first of the texts.

    Raises:
      UserError: `output` does not end in .model, there are too few texts for `size`, or the file cannot be written.
    """
    output = at(output)
    if output.suffix != ".model":
        raise UserError(f"{output} is not a name for a SentencePiece model: let it end in .model")
    if model not in _MODELS:
        raise UserError(f"model is {model!r}: {nearest(model, _MODELS)}")
    # A list, because SentencePiece keeps all lines anyway, and would hide errors of an iterator.
    lines = list(itertools.islice(_lines(texts), sentences))
    if not lines:
        raise UserError("there is no text to train a vocabulary on: give a source with pairs")
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=content,
            model_type=model,
            vocab_size=size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            # For chats and posts: newlines are kept, and texts are not normalised.
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            max_sentence_length=8 * _LONGEST,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        message = str(error).splitlines()[-1].rpartition("] ")[2][:160]
        # SentencePiece's own remedies are options that this function does not have.
        limits = {r"smaller than required_chars\. \d+ vs (\d+)": "at least", r"too high .* <= (\d+)": "at most"}
        found = [(words, limit[1]) for form, words in limits.items() if (limit := re.search(form, message))]
        reason, remedy = (
            (f"they need {' '.join(found[0])} pieces", f", {' '.join(found[0])}") if found else (message, "")
        )
        raise UserError(
            f"size is {size}, which does not suit these texts ({reason}): choose another size{remedy}"
        ) from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, content.getvalue())
    return SentencePieceVocabulary(output)


def source_texts(config: TextSourceConfig) -> Iterator[str]:
    """Prompts and responses of a source; a prompt comes once for each of its pairs. Raises UserError."""
    for pair in open_source(config).read():
        if not isinstance(pair, Dropped):
            yield pair.prompt
            yield from pair.responses


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Parts of the texts, with their newlines; SentencePiece takes each part as a sentence."""
    for text in texts:
        for start in range(0, len(text), _LONGEST):
            yield text[start : start + _LONGEST]
