"""Measure the checkpoints of a run: win rates by any judge, KL, accuracy, log-ratios, length.

alignment-gap evaluate --run=runs/online --dataset=prepared/validation --judges=golden=runs/golden,rubric \\
    --opponents=offline=runs/offline,sft=runs/sft --output=runs/evaluation
"""

from __future__ import annotations

from alignment_gap.cli.job import run_command


def main(arguments: list[str]) -> None:
    """Runs the evaluation; raises UserError for flags or settings that cannot be used."""
    from alignment_gap.jobs.evaluate import EVALUATE

    run_command(EVALUATE, arguments, __doc__)
