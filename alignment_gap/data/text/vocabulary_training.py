"""Trains a SentencePiece vocabulary with T5's special ids on texts of the user's own."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator

import sentencepiece

from alignment_gap.checks import nearest
from alignment_gap.data.text import Dropped, TextSourceConfig, open_source
from alignment_gap.data.text.vocabulary import SentencePieceVocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at, write_bytes

# SentencePiece leaves out longer lines silently; it splits at blank space anyway.
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

    Special ids are T5's: pad 0, end 1, unknown 2, and no begin id. A character that is in no text is written as its
    bytes, so that every text can be expressed.

    Args:
      texts: what it is to express.
      output: the file, `*.model`.
      size: number of pieces, special ones and the 256 bytes included.
      model: "unigram" or "bpe".
      sentences: lines of the texts to train on, the first so many.

    Raises:
      UserError: `output` has another ending, the texts are too few for `size`, or the file cannot be written.
    """
    output = at(output)
    if output.suffix != ".model":
        raise UserError(f"{output} is no name of a SentencePiece model: let it end in .model")
    if model not in _MODELS:
        raise UserError(f"model is {model!r}: {nearest(model, _MODELS)}")
    # All at once: SentencePiece keeps them too, and hides what a source raises while it draws from it.
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
            # What a chat or a post is made of: line ends stay, and nothing is normalised away.
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
        raise UserError(f"size is {size}, which does not suit these texts ({message}): choose another size") from None
    output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output, content.getvalue())
    return SentencePieceVocabulary(output)


def source_texts(config: TextSourceConfig) -> Iterator[str]:
    """Prompts and responses of a source, a prompt once for each of its pairs; raises UserError."""
    for pair in open_source(config).read():
        if not isinstance(pair, Dropped):
            yield pair.prompt
            yield from pair.responses


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Parts of the texts that SentencePiece takes as a sentence each, with their line ends."""
    for text in texts:
        for start in range(0, len(text), _LONGEST):
            yield text[start : start + _LONGEST]
