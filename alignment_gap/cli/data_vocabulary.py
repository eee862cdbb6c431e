"""alignment-gap data vocabulary."""

from __future__ import annotations

from absl import flags

from alignment_gap.cli.data import define_source_flags, definers, parse, require, source_config


def vocabulary(arguments: list[str]) -> None:
    """Train a SentencePiece vocabulary, with T5's special ids, on the texts of a source."""

    def define(values: flags.FlagValues) -> None:
        text, number = definers(values)
        define_source_flags(values)
        text("output", "", "The file, *.model.")
        number("size", 32_000, "Number of pieces, special ones and 256 bytes included.")
        text("model", "unigram", "unigram or bpe.")

    values = parse(arguments, define, vocabulary.__doc__)
    if values is None:
        return

    from alignment_gap.data.text.vocabulary_training import source_texts, train_vocabulary

    texts = source_texts(source_config(values))
    trained = train_vocabulary(texts, require(values, "output"), values.size, model=values.model)
    special = f"pad {trained.pad_id}, end {trained.eos_id}, unknown {trained.unk_id}"
    print(f"{trained.path}: {trained.size:,} ids, of them {trained.extra_ids} sentinels; {special}")
