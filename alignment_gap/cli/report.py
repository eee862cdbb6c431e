"""Put finished studies side by side on one page, or training jobs: their curves, settings, last metrics, throughput.

alignment-gap report --runs=runs/study_a,runs/study_b --workdir=runs/compared
alignment-gap report --runs=runs/sft,runs/online --workdir=runs/curves

The folders are of one kind; a training job may still run. The report of one study is a job of that study:
alignment-gap study --job=report.
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

    print(f"report: {write_comparison([at(run) for run in values.runs], at(values.workdir))}")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list("runs", None, "Folders of studies or of training jobs, with commas between.", flag_values=values)
    flags.DEFINE_string("workdir", "runs/compared", "Folder of the page.", flag_values=values)
