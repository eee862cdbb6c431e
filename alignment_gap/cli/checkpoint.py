"""Import checkpoints of other libraries, export checkpoints to them, and show what a checkpoint contains.

An imported checkpoint is the folder of a run. `alignment-gap train --gin.START=RUN` trains its model further.
alignment-gap checkpoint COMMAND --help shows a command's flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from alignment_gap.cli.flags import parse, require, run_subcommand
from alignment_gap.errors import UserError
from alignment_gap.folders import at, here


def main(arguments: list[str]) -> None:
    """Runs the sub-command that the first argument names."""
    run_subcommand(arguments, SUBCOMMANDS, __doc__)


def import_(arguments: list[str]) -> None:
    """Import a checkpoint of T5X, or of the Hugging Face Hub, as the folder of a run.

    alignment-gap checkpoint import --from=t5x/checkpoint_1000 --output=runs/imported
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("from", None, "File, folder or repository of the hub to import.", flag_values=values)
        flags.DEFINE_string("output", None, "The new run's folder.", flag_values=values)
        flags.DEFINE_string("format", None, "Format of the checkpoint; by default it is detected.", flag_values=values)
        flags.DEFINE_string("base", None, "For PEFT adapters: folder of the run with their base.", flag_values=values)

    parsed = parse(arguments, define, import_.__doc__)
    if parsed is None:
        return
    values, _ = parsed
    source, output = (here(require(values, flag), "an imported checkpoint") for flag in ("from", "output"))
    from alignment_gap.checkpoints.formats import import_checkpoint
    from alignment_gap.data.text.vocabulary_loading import tokenizer_digest

    base = at(values.base) if values.base else None
    stored = import_checkpoint(source, output, values.format, tokenizer_digest, base)
    print(f"{stored.folder}: {_summary(stored.tensors)}")


def export(arguments: list[str]) -> None:
    """Export a checkpoint of a run in the format of another library.

    alignment-gap checkpoint export --checkpoint=runs/online --format=huggingface --output=exported
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("checkpoint", None, "Folder of a run or of one of its checkpoints.", flag_values=values)
        flags.DEFINE_string("format", None, "Format to write, such as huggingface, t5x or peft.", flag_values=values)
        flags.DEFINE_string("output", None, "The new file or folder.", flag_values=values)
        flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the last.", flag_values=values)
        flags.DEFINE_string(
            "tokenizer", None, "Folder of tokenizer files to export too; by default the run's own.", flag_values=values
        )
        flags.DEFINE_string(
            "evaluation", None, "Folder of an evaluation of this checkpoint, for the model card.", flag_values=values
        )

    parsed = parse(arguments, define, export.__doc__)
    if parsed is None:
        return
    values, _ = parsed
    checkpoint, name, output = (require(values, flag) for flag in ("checkpoint", "format", "output"))
    from alignment_gap.checkpoints.formats import WITH_CARD, export_checkpoint
    from alignment_gap.jobs.model_card import model_card

    run, folder = at(checkpoint), here(output, "an exported checkpoint")
    if values.evaluation and name not in WITH_CARD:
        raise UserError(f"evaluation is set, but {name} has no model card: unset it, or export as huggingface")
    library = WITH_CARD.get(name)
    card = model_card(run, folder.name, library, values.step, values.evaluation) if library else None
    tokenizer = Path(values.tokenizer) if values.tokenizer else None
    export_checkpoint(run, folder, name, values.step, tokenizer, card)
    print(output)


def push(arguments: list[str]) -> None:
    """Push an exported folder to the Hugging Face Hub, with the token from HF_TOKEN or from `hf auth login`.

    alignment-gap checkpoint push --from=exported --to=me/online-ipo
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("from", None, "Folder that `checkpoint export` wrote.", flag_values=values)
        flags.DEFINE_string("to", None, "Repository on the hub, USER/NAME.", flag_values=values)
        flags.DEFINE_bool("private", False, "Whether a new repository is private.", flag_values=values)

    parsed = parse(arguments, define, push.__doc__)
    if parsed is None:
        return
    values, _ = parsed
    folder, name = here(require(values, "from"), "the folder to push"), require(values, "to")
    from alignment_gap.checkpoints.huggingface.hub import push as push_folder

    print(push_folder(folder, name, values.private))


def show(arguments: list[str]) -> None:
    """Show the settings and the tensors of a checkpoint.

    alignment-gap checkpoint show runs/online
    """
    parsed = parse(arguments, lambda values: None, show.__doc__, positional=1)
    if parsed is None:
        return
    _, paths = parsed
    if not paths:
        raise UserError("checkpoint show needs the path of a checkpoint: alignment-gap checkpoint show PATH")
    from alignment_gap.checkpoints.formats import describe
    from alignment_gap.configuration import flatten

    facts, tensors = describe(at(paths[0]))
    for key, value in flatten(facts).items():
        print(f"{key:40}{value}")
    print(f"{'tensors':40}{_summary(tensors)}")
    for name, tensor in sorted(tensors.items()):
        print(f"  {name:60}{tensor.dtype:10}{'x'.join(map(str, tensor.shape)) or 'scalar'}")


SUBCOMMANDS: dict[str, Callable[[list[str]], None]] = {
    "import": import_,
    "export": export,
    "push": push,
    "show": show,
}


def _summary(tensors: Mapping[str, Any]) -> str:
    from alignment_gap.checkpoints.tensors import parameter_count

    dtypes = " and ".join(sorted({tensor.dtype for tensor in tensors.values()}))
    count = parameter_count(tensors)
    unit = 3 * int(math.log10(max(count, 1)) // 3)
    short = f" ({count / 10**unit:.3g}{' kMGT'[unit // 3]})" if unit else ""
    return f"{len(tensors)} tensors of {count} parameters{short} in {dtypes}"
