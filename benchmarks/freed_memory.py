"""Measures the gain on a CPU from keeping freed memory for the next call: a job of a study with and without it.

python benchmarks/freed_memory.py --pairs 3

The job is the SFT of configs/study/tiny.py, shortened, in its own process, including start-up and compilation. Runs
with and without kept memory take turns; a run with kept memory is first. CPU seconds include user and system time;
other work on the machine disturbs them less than wall time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import struct_rusage

ROOT = Path(__file__).parents[1]
KEPT = "from alignment_gap.cli.main import main; main()"
GIVEN_BACK = f"from alignment_gap import freed_memory; freed_memory.keep_on_cpu = lambda: None; {KEPT}"


def main() -> None:
    """Prints a row for each pair of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    words = ["study", f"--config={ROOT / 'configs/study/tiny.py'}", f"--config.sft.steps={options.steps}"]
    print("| | CPU s, kept | given back | ratio | s in the system | | page faults | | GiB at most | |")
    print("|" + " --- |" * 10)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        run(KEPT, [*words, f"--workdir={prepared}", "--job=seed0-data"])
        for number in range(options.pairs):
            usages = []
            for code in (KEPT, GIVEN_BACK):
                workdir = Path(folder) / f"run{len(ratios)}"
                shutil.copytree(prepared, workdir)
                usages.append(run(code, [*words, f"--workdir={workdir}", "--job=seed0-sft"]))
                shutil.rmtree(workdir)
            seconds = [usage.ru_utime + usage.ru_stime for usage in usages]
            ratios.append(seconds[0] / seconds[1])
            cells = [f"{value:.1f}" for value in seconds] + [f"{ratios[-1]:.2f}"]
            cells += [f"{usage.ru_stime:.1f}" for usage in usages] + [f"{usage.ru_minflt:,}" for usage in usages]
            cells += [f"{usage.ru_maxrss / 2**20:.2f}" for usage in usages]
            print(f"| {number + 1} | {' | '.join(cells)} |", flush=True)
    print(f"\nmedian ratio {statistics.median(ratios):.2f}; {options.steps} steps; {os.cpu_count()} CPUs")


def run(code: str, words: list[str]) -> struct_rusage:
    """Runs a command in a process; returns its resource usage."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", code, *words], env=environment, **quiet) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    if status:
        sys.exit(f"{words[-1]}: exit status {status}")
    return usage


if __name__ == "__main__":
    main()
