"""A command that runs one job; its flags are the settings of the job, and the folder."""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from alignment_gap.cli.flags import define_config, define_shared, parse, read_config, require, start_jax
from alignment_gap.folders import AnyPath, at
from alignment_gap.jobs.folder import Kind, make


def run_command(kind: Kind, arguments: Sequence[str], help_text: str | None) -> None:
    """Runs the job of a command line in its folder, and prints a summary of the folder."""
    parsed = read_command(kind, arguments, help_text)
    if parsed is None:
        return
    values, config = parsed
    run_job(kind, config, at(require(values, kind.output)), values)


def read_command(kind: Kind, arguments: Sequence[str], help_text: str | None) -> tuple[flags.FlagValues, object] | None:
    """The flags and the settings of a job; None after help. Raises UserError if they cannot be used."""

    def define(values: flags.FlagValues) -> None:
        define_config(values, kind.config, kind.short)
        flags.DEFINE_string(kind.output, None, "Folder of the job; a stopped job continues.", flag_values=values)
        define_shared(values)

    parsed = parse(arguments, define, help_text)
    if parsed is None:
        return None
    values, _ = parsed
    return values, read_config(values, kind.config, kind.short)


def run_job(kind: Kind, config: object, folder: AnyPath, values: flags.FlagValues) -> None:
    """Runs a job with the shared flags, and prints a summary of its folder."""
    start_jax(values)
    make(kind, config, folder)

    from alignment_gap.sharding import is_first_process

    if is_first_process():
        print(kind.summary(folder))
