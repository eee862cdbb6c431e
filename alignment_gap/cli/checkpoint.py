"""Checkpoints of other libraries in and out, and what a checkpoint holds.

alignment-gap checkpoint import --from=FILE_OR_FOLDER --output=RUN [--format=NAME]
alignment-gap checkpoint export --checkpoint=RUN --format=NAME --output=FILE_OR_FOLDER [--step=N] [--tokenizer=FOLDER]
alignment-gap checkpoint show PATH

An imported checkpoint is a run's folder: `alignment-gap train --gin.START=RUN` trains its model from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from alignment_gap.cli.parsing import parse_flags
from alignment_gap.errors import UserError


def main(arguments: list[str]) -> None:
    """Runs the action that the first argument names; raises UserError for what cannot be used."""
    command, *rest = arguments
    if not rest or rest[0] in ("--help", "-h"):
        print(__doc__, *(make(flags.FlagValues()).get_help() for make in (_import_flags, _export_flags)), sep="\n")
        return
    actions: dict[str, Callable[[list[str]], None]] = {"import": _import, "export": _export, "show": _show}
    if rest[0] not in actions:
        raise UserError(f"{command} {rest[0]}: choose one of {', '.join(actions)}")
    actions[rest[0]]([f"{command} {rest[0]}", *rest[1:]])


def _import_flags(values: flags.FlagValues) -> flags.FlagValues:
    flags.DEFINE_string("from", None, "File or folder to import, or an id on the hub.", flag_values=values)
    flags.DEFINE_string("output", None, "The new run's folder.", flag_values=values)
    flags.DEFINE_string("format", "", "Its format; found by looking where empty.", flag_values=values)
    return values


def _export_flags(values: flags.FlagValues) -> flags.FlagValues:
    flags.DEFINE_string("checkpoint", None, "Folder of a run or of one of its checkpoints.", flag_values=values)
    flags.DEFINE_string("format", None, "Format to write, such as huggingface or t5x.", flag_values=values)
    flags.DEFINE_string("output", None, "The new file or folder.", flag_values=values)
    flags.DEFINE_integer("step", None, "Which of the run's checkpoints; the last one if not given.", flag_values=values)
    flags.DEFINE_string(
        "tokenizer", None, "Folder of tokenizer files to go with it; the run's own if not given.", flag_values=values
    )
    return values


def _import(arguments: list[str]) -> None:
    values = _parsed(_import_flags, arguments, ("from", "output"))
    from alignment_gap.checkpoints.formats import import_checkpoint

    stored = import_checkpoint(Path(str(values["from"].value)), Path(values.output), values.format)
    print(f"{stored.folder}: {_summary(stored.tensors)}")


def _export(arguments: list[str]) -> None:
    values = _parsed(_export_flags, arguments, ("checkpoint", "format", "output"))
    from alignment_gap.checkpoints.formats import export_checkpoint

    tokenizer = Path(values.tokenizer) if values.tokenizer else None
    export_checkpoint(Path(values.checkpoint), Path(values.output), values.format, values.step, tokenizer)
    print(values.output)


def _show(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[1].startswith("-"):
        raise UserError("alignment-gap checkpoint show takes one argument, the path of a checkpoint")
    from alignment_gap.checkpoints.formats import describe
    from alignment_gap.configuration import flatten

    facts, tensors = describe(Path(arguments[1]))
    for key, value in flatten(facts).items():
        print(f"{key:40}{value}")
    print(f"{'tensors':40}{_summary(tensors)}")
    for name, tensor in sorted(tensors.items()):
        print(f"  {name:60}{tensor.dtype:10}{'x'.join(map(str, tensor.shape)) or 'scalar'}")


def _summary(tensors: Mapping[str, Any]) -> str:
    from alignment_gap.checkpoints.tensors import parameter_count

    dtypes = " and ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    count = parameter_count(tensors)
    unit = 3 * int(math.log10(max(count, 1)) // 3)
    short = f" ({count / 10**unit:.3g}{' kMGT'[unit // 3]})" if unit else ""
    return f"{len(tensors)} tensors of {count} parameters{short} in {dtypes}"


def _parsed(make: Callable[..., flags.FlagValues], arguments: list[str], needed: tuple[str, ...]) -> flags.FlagValues:
    values = make(flags.FlagValues())
    if "--help" in arguments or "-h" in arguments:
        print(__doc__, values.get_help(), sep="\n")
        raise SystemExit(0)
    parse_flags(values, arguments)
    missing = [name for name in needed if not values[name].value]
    if missing:
        raise UserError(f"{arguments[0]} needs --{missing[0]}")
    return values
