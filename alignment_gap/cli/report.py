"""Compare finished studies, or training jobs with their curves, settings, metrics and throughput, on one page.

alignment-gap report --runs=runs/study_a,runs/study_b --workdir=runs/compared
alignment-gap report --runs=runs/sft,runs/online --workdir=runs/curves
alignment-gap report --runs=runs/seeds_0_1,runs/seeds_2_4 --pool --workdir=runs/seeds_0_4

All folders must be studies, or all training jobs; a training job may still be running. --pool writes one report over
studies that differ only in their seeds, as if one study had run all seeds. It needs the folders of the reports, not
those of the jobs. To write the report of a single study, run alignment-gap study --job=report.
"""

from __future__ import annotations

from absl import flags

from alignment_gap.cli.flags import parse, require
from alignment_gap.folders import at


def main(arguments: list[str]) -> None:
    """Writes the page; raises UserError for folders that cannot be read together."""
    parsed = parse(arguments, _define, __doc__)
    if parsed is None:
        return
    values, _ = parsed
    require(values, "runs")

    from alignment_gap.study.compare import write_comparison
    from alignment_gap.study.pool import write_pooled

    write = write_pooled if values.pool else write_comparison
    print(f"report: {write([at(run) for run in values.runs], at(values.workdir))}")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("runs", None, "Folders of studies or of training jobs, separated by commas.", flag_values=values)
    flags.DEFINE_boolean(
        "pool", False, "Write one report over studies that differ only in their seeds.", flag_values=values
    )
    flags.DEFINE_string("workdir", "runs/compared", "Folder of the page.", flag_values=values)
