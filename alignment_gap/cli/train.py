"""Train a policy or a preference model, online or offline, from gin files. A stopped job continues.

alignment-gap train --gin_file=gin/runs/offline_ipo.gin --gin.DATASET=pairs --gin.START=runs/sft --workdir=runs/ipo
alignment-gap train --gin_file=gin/runs/online_ipo.gin --gin.PROMPTS=pairs --gin.START=runs/sft \\
    --gin.JUDGE=runs/proxy --workdir=runs/online
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from alignment_gap.cli import gin_files
from alignment_gap.cli.flags import define_shared, parse
from alignment_gap.cli.job import run_job
from alignment_gap.folders import at

if TYPE_CHECKING:
    from alignment_gap.jobs.config import JobConfig

WORKDIR = "runs/train"


def main(arguments: list[str]) -> None:
    """Runs the job; raises UserError for flags or settings that cannot be used."""
    read = read_job(arguments)
    if read is None:
        return
    values, config = read

    from alignment_gap.jobs.train import TRAIN

    run_job(TRAIN, config, at(values.workdir), values)


def read_job(arguments: list[str]) -> tuple[flags.FlagValues, JobConfig] | None:
    """The flags and the settings of a job; None after help. Raises UserError if they cannot be used."""
    rest, overrides = gin_files.split_overrides(arguments)
    parsed = parse(rest, _define, f"{__doc__}\n{gin_files.__doc__}")
    if parsed is None:
        return None
    values, _ = parsed
    return values, gin_files.read_config(values.gin_file, overrides, values.gin_search_paths)


def _define(values: flags.FlagValues) -> None:
    gin_files.define_gin(values)
    flags.DEFINE_string("workdir", WORKDIR, "Folder of the job; a stopped job continues.", flag_values=values)
    define_shared(values)
