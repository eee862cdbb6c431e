"""Prepare datasets, make new ones from them, score them with a reference policy, show what they are.

alignment-gap data vocabulary --source=pairs.jsonl.gz --size=32000 --output=own.model
alignment-gap data prepare --source=pairs.jsonl.gz --vocabulary=own.model --output=prepared
alignment-gap data show prepared/train --examples=3
alignment-gap data shuffle --input=prepared/train --output=shuffled --window=320
alignment-gap data mix --inputs=a,b --weights=0.7,0.3 --output=mixed
alignment-gap data relabel --input=prepared/train --preference_model=runs/golden --output=relabelled
alignment-gap data generate --prompts=prepared/train --policies=runs/a,runs/b --preference_model=runs/golden --output=ab
alignment-gap data reference --dataset=prepared/train --checkpoint=runs/sft

A command that was stopped goes on from its finished parts. alignment-gap data COMMAND --help tells a command's flags.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from alignment_gap.cli.parsing import parse_flags
from alignment_gap.errors import UserError

if TYPE_CHECKING:
    from alignment_gap.data.text import TextSourceConfig

# What each is done by: a function of the command line in a module of this floor.
SUBCOMMANDS = {
    "vocabulary": "data_vocabulary:vocabulary",
    "prepare": "data:prepare",
    "show": "data:show",
    "shuffle": "data_derive:shuffle",
    "mix": "data_derive:mix",
    "relabel": "data_derive:relabel",
    "generate": "data_derive:generate",
    "reference": "data_derive:reference",
}


def main(arguments: list[str]) -> None:
    """Runs a sub-command; raises UserError for one that does not exist."""
    names = arguments[1:2]
    if not names or names[0] in ("--help", "-h"):
        print(__doc__)
        return
    if names[0] not in SUBCOMMANDS:
        near = get_close_matches(names[0], SUBCOMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUBCOMMANDS)}"
        raise UserError(f"unknown command data {names[0]!r}: {hint}")
    module, _, function = SUBCOMMANDS[names[0]].partition(":")
    run = getattr(importlib.import_module(f"alignment_gap.cli.{module}"), function)
    run([f"{arguments[0]} {names[0]}", *arguments[2:]])


def prepare(arguments: list[str]) -> None:
    """Prepare a source's pairs: record files, a card, a preview and a picture of the lengths."""
    values = parse(arguments, _prepare_flags, prepare.__doc__)
    if values is None:
        return

    from alignment_gap.data.records.card import lengths_text
    from alignment_gap.data.tasks.prepare import PREVIEW, PrepareConfig
    from alignment_gap.data.tasks.prepare import prepare as run
    from alignment_gap.data.text import Limits

    def of(cls: type) -> dict[str, object]:
        return {field.name: values[field.name].value for field in dataclasses.fields(cls) if field.name in values}

    source = source_config(values)
    require(values, "vocabulary")
    settings = {name: value for name, value in of(PrepareConfig).items() if name != "source"}
    config = PrepareConfig(source, limits=Limits(**of(Limits)), **settings)  # type: ignore[arg-type]
    output = Path(require(values, "output"))
    if values.processes < 0:
        raise UserError(f"--processes={values.processes} is out of range: give so many, or 0 for one on each core")
    cards = run(config, output, processes=values.processes or len(os.sched_getaffinity(0)))
    for split, card in sorted(cards.items()):
        print(f"{output / split}: {card.count:,} examples")
        for name in ("prompt", "response"):
            print(f"  {name}s: {lengths_text(card.lengths[name])} tokens")
    about = next(iter(cards.values())).provenance
    print("dropped:", ", ".join(f"{count:,} {reason}" for reason, count in about["dropped"].items()) or "none")
    if about["cut_prompts"]:
        print(f"cut to their last tokens: {about['cut_prompts']:,} prompts")
    print(f"preview: {output / PREVIEW}")


def show(arguments: list[str]) -> None:
    """Show a dataset's card, what it was made from, and some of its examples: data show FOLDER."""
    values = parse(arguments, _show_flags, show.__doc__, positional=1)
    if values is None:
        return

    from alignment_gap.data.records.card import card_text, find_vocabulary
    from alignment_gap.data.records.dataset import open_dataset, verify_dataset
    from alignment_gap.data.records.preview import preview

    dataset = open_dataset(require(values, "folder"))
    verify_dataset(dataset)
    print(card_text(dataset))
    if values.examples:
        print(preview(dataset, find_vocabulary(dataset, values.vocabulary), values.examples))


def parse(
    arguments: Sequence[str], define: Callable[[flags.FlagValues], None], help_text: str | None, *, positional: int = 0
) -> flags.FlagValues | None:
    """The flags of a sub-command, or None after its help was printed; raises UserError for what is no flag of it.

    `positional` arguments that are no flags are taken as the value of the flag "folder".
    """
    values = flags.FlagValues()
    define(values)
    if "--help" in arguments or "-h" in arguments:
        print(help_text, values.get_help(), sep="\n")
        return None
    rest = parse_flags(values, arguments, positional=positional)
    if rest:
        values["folder"].value = rest[0]
    return values


def require(values: flags.FlagValues, name: str) -> str:
    """The value of a flag that has to be given."""
    if not values[name].value:
        raise UserError(f"--{name} is not set: add --{name}=VALUE")
    return str(values[name].value)


def define_source_flags(values: flags.FlagValues) -> None:
    """What says where pairs are and how they are read."""
    text, _ = definers(values)
    text("source", "", "File, folder, hub: or tfds: name of the pairs; several with commas between.")
    text("task", "auto", "summarization, helpfulness, harmlessness, chat_arena, pairs; auto tells by the first record.")
    text("fields", "", "Columns of your own pairs: prompt=question,chosen=good,rejected=bad.")
    text("labels", "", "Meaning of a label's values: model=1,reference=0,both=0.5,=drop.")
    text("template", "plain", "How conversations are written: plain, a jinja file, or a tokenizer's folder.")
    text("ties", "drop", "drop or keep pairs without a preference.")
    text("duplicates", "", "drop or keep pairs that come again; the task's own rule where empty.")
    text("bad_pairs", "refuse", "refuse or drop pairs that hold no preference.")


def source_config(values: flags.FlagValues) -> TextSourceConfig:
    """The source of the flags; raises UserError where none is given."""
    from alignment_gap.data.text import TextSourceConfig

    names = [field.name for field in dataclasses.fields(TextSourceConfig) if field.name in values]
    settings = {name: values[name].value for name in names}
    return TextSourceConfig(location=require(values, "source"), **settings)  # type: ignore[arg-type]


def _prepare_flags(values: flags.FlagValues) -> None:
    text, number = definers(values)
    define_source_flags(values)
    text("vocabulary", "", "SentencePiece *.model, word list *.txt, tokenizer.json or its folder, or bytes.")
    text("output", "", "Folder of the prepared datasets; one that was stopped goes on there.")
    number("prompt_length", 512, "Most tokens of a prompt.")
    number("response_length", 256, "Most tokens of a response, its end included.")
    text("long_prompts", "drop", "drop, refuse, or keep_end: the last tokens.")
    text("long_responses", "drop", "drop or refuse.")
    flags.DEFINE_float("validation", 0.02, "Share of the prompts that is held out.", flag_values=values)
    number("seed", 0, "Of the split.")
    number(
        "records_per_file", 0, "Records of the source that make one record file; 0 for 5000, or more of a large source."
    )
    number("processes", 0, "Processes that work at it; 0 for one on each core.")


def _show_flags(values: flags.FlagValues) -> None:
    text, number = definers(values)
    text("folder", "", "The dataset.")
    number("examples", 3, "Examples to show.")
    text("vocabulary", "", "What the examples were encoded with, where it is no longer at its place.")


def definers(values: flags.FlagValues) -> tuple[Callable[[str, str, str], None], Callable[[str, int, str], None]]:
    """What defines a flag that is a text, and one that is a whole number: (name, default, help)."""

    def text(name: str, default: str, help_text: str) -> None:
        flags.DEFINE_string(name, default, help_text, flag_values=values)

    def number(name: str, default: int, help_text: str) -> None:
        flags.DEFINE_integer(name, default, help_text, flag_values=values)

    return text, number
