"""Prepare datasets, make new datasets from them, score them with a reference policy, show them.

A stopped command continues after its finished parts. alignment-gap data COMMAND --help shows a command's flags.
"""

from __future__ import annotations

from collections.abc import Callable

from absl import flags

from alignment_gap.cli.flags import define_config, parse, read_config, require, run_subcommand
from alignment_gap.cli.job import run_command
from alignment_gap.errors import UserError


def main(arguments: list[str]) -> None:
    """Runs the sub-command that the first argument names."""
    run_subcommand(arguments, SUBCOMMANDS, __doc__)


def prepare(arguments: list[str]) -> None:
    """Prepare the pairs of a source: writes record files, a card, a preview and a picture of the lengths.

    alignment-gap data prepare --source=pairs.jsonl.gz --vocabulary=own.model --output=prepared
    """
    from alignment_gap.jobs.prepare import PREPARE

    run_command(PREPARE, arguments, prepare.__doc__)


def label(arguments: list[str]) -> None:
    """Label a dataset by a judge.

    alignment-gap data label --dataset=prepared/train --judge=runs/golden --output=labelled
    """
    from alignment_gap.jobs.label import LABEL

    run_command(LABEL, arguments, label.__doc__)


def generate(arguments: list[str]) -> None:
    """Sample responses to a dataset's prompts from one policy or from two, and label them.

    alignment-gap data generate --prompts=prepared/train --policies=runs/a,runs/b --judge=runs/golden --output=a_vs_b
    """
    from alignment_gap.jobs.generate import GENERATE

    run_command(GENERATE, arguments, generate.__doc__)


def compose(arguments: list[str]) -> None:
    """Shuffle a dataset, mix several by weight, or keep the first examples.

    alignment-gap data compose --datasets=labelled,a_vs_b --weights=0.7,0.3 --output=mixed
    """
    from alignment_gap.jobs.compose import COMPOSE

    run_command(COMPOSE, arguments, compose.__doc__)


def baselines(arguments: list[str]) -> None:
    """Measure how well length, and a regression on n-grams, predict the labels of held-out pairs.

    alignment-gap data baselines --train=prepared/train --dataset=prepared/validation --output=baselines
    """
    from alignment_gap.jobs.baselines import BASELINES

    run_command(BASELINES, arguments, baselines.__doc__)


def reference(arguments: list[str]) -> None:
    """Compute the log-probs of a job's datasets under its reference policy in advance, and store them beside each.

    alignment-gap data reference --dataset=prepared/train --checkpoint=runs/sft --output=runs/sft_log_probs

    A job with REFERENCE_LOG_PROBS=stored or auto uses them if it has the same datasets, reference, lengths, buckets,
    dtype and attention. The output folder records what was scored.
    """
    from alignment_gap.jobs.reference import REFERENCE

    run_command(REFERENCE, arguments, reference.__doc__)


def show(arguments: list[str]) -> None:
    """Show a dataset's card, its inputs, and some of its examples.

    alignment-gap data show prepared/train --examples=3
    """
    from alignment_gap.data.records import open_dataset, verify_dataset
    from alignment_gap.data.records.card import card_text, find_vocabulary
    from alignment_gap.data.records.preview import preview

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_integer("examples", 3, "Number of examples to show.", lower_bound=0, flag_values=values)
        flags.DEFINE_string(
            "vocabulary", None, "Path of the dataset's vocabulary, if it has moved.", flag_values=values
        )

    parsed = parse(arguments, define, show.__doc__, positional=1)
    if parsed is None:
        return
    values, folders = parsed
    if not folders:
        raise UserError("data show needs the folder of a dataset: alignment-gap data show FOLDER")
    dataset = open_dataset(folders[0])
    verify_dataset(dataset)
    print(card_text(dataset))
    if values.examples:
        print(preview(dataset, find_vocabulary(dataset, values.vocabulary), values.examples))


def vocabulary(arguments: list[str]) -> None:
    """Train a SentencePiece vocabulary, with T5's special ids, on the texts of a source.

    alignment-gap data vocabulary --source=pairs.jsonl.gz --size=32000 --output=own.model
    """
    from alignment_gap.data.text import TextSourceConfig
    from alignment_gap.data.text.vocabulary_training import source_texts, train_vocabulary
    from alignment_gap.jobs.prepare import SOURCE_FLAGS

    def define(values: flags.FlagValues) -> None:
        define_config(values, TextSourceConfig, SOURCE_FLAGS)
        flags.DEFINE_string("output", None, "The file to write, *.model.", flag_values=values)
        flags.DEFINE_integer(
            "size", 32_000, "Number of pieces, including special pieces and 256 bytes.", flag_values=values
        )
        flags.DEFINE_enum("model", "unigram", ("unigram", "bpe"), "Kind of SentencePiece model.", flag_values=values)

    parsed = parse(arguments, define, vocabulary.__doc__)
    if parsed is None:
        return
    values, _ = parsed
    texts = source_texts(read_config(values, TextSourceConfig, SOURCE_FLAGS))
    trained = train_vocabulary(texts, require(values, "output"), values.size, model=values.model)
    special = f"pad {trained.pad_id}, end {trained.eos_id}, unknown {trained.unk_id}"
    print(f"{trained.path}: {trained.size:,} ids, of them {trained.extra_ids} sentinels; {special}")


SUBCOMMANDS: dict[str, Callable[[list[str]], None]] = {
    "vocabulary": vocabulary,
    "prepare": prepare,
    "show": show,
    "label": label,
    "generate": generate,
    "compose": compose,
    "baselines": baselines,
    "reference": reference,
}
