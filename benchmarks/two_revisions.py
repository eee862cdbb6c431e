"""Rates of two revisions of the library, measured in turn: the ratio of after to before, for each row of a benchmark.

    git worktree add ../before <revision>
    python benchmarks/two_revisions.py ../before sampler.py --sizes compared --prompt-length 512 --calls 1 --repeats 1

The folder is a checkout of the earlier revision. The rest names update_step.py or sampler.py, of this revision, and its
flags. The script measures each library in turn, in pairs, so that both meet the same machine. A row has the median over
the pairs, the smallest and the largest ratio.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
UNITS = ("tokens/s", "pairs/s")


def measure(library: pathlib.Path, script: str, flags: list[str]) -> dict[str, float]:
    """The rate of each row of the benchmark, with the library of this checkout."""
    path = os.pathsep.join([str(library), os.environ.get("PYTHONPATH", "")])
    printed = subprocess.run(
        [sys.executable, HERE / script, *flags],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    named = ("size", "policy", "reference")
    return {
        " ".join(row[name] for name in named if name in row): next(row[unit] for unit in UNITS if unit in row)
        for row in rows
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("before", type=pathlib.Path, help="a checkout of the earlier revision")
    parser.add_argument("script", choices=("sampler.py", "update_step.py"))
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the flags of the benchmark")
    options = parser.parse_args()
    if not (options.before / "alignment_gap").is_dir():
        parser.error(f"{options.before} has no folder alignment_gap: give a checkout of the earlier revision")
    ratios = collections.defaultdict(list)
    for _ in range(options.pairs):
        libraries = (options.before.resolve(), HERE.parent)
        before, after = (measure(library, options.script, options.flags) for library in libraries)
        for row in before:
            ratios[row].append(after[row] / before[row])
    print(f"| row | after / before, median of {options.pairs} pairs | smallest | largest |")
    print("| --- | --- | --- | --- |")
    for row, found in ratios.items():
        print(f"| {row} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")


if __name__ == "__main__":
    main()
