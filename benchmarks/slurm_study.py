"""Runs a study of several seeds and sizes on a real Slurm, disturbs it, and compares it with an undisturbed run.

python benchmarks/slurm_study.py --seeds 3 --events 24

The undisturbed study runs in one process. Then the same study is launched on a Slurm with three nodes on this machine,
started by tests/launch/slurm_cluster.py. At random moments its running jobs are preempted by jobs of a higher priority,
requeued, or killed with signal 9. Every results.csv must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from alignment_gap.launch.tasks import COMMAND

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "launch"))
from slurm_cluster import cluster, missing  # noqa: E402

NODES = 3


def main() -> None:
    """Runs both studies and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tests/study/nano.py", help="config of the study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", default="palm_30k,palm_300k")
    parser.add_argument("--events", type=int, default=24, help="number of disturbances")
    parser.add_argument("--workdir", type=Path, default=ROOT / ".cache" / "slurm_study", help="removed at the start")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments and kinds of disturbances")
    flags = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    shutil.rmtree(flags.workdir, ignore_errors=True)
    words = [
        "study",
        f"--config={os.path.abspath(flags.config)}",
        f"--config.seeds={flags.seeds}",
        f"--config.sizes={tuple(flags.sizes.split(','))!r}",
        "--workdir=study",
        f"--compilation_cache={ROOT / '.cache' / 'jax-kills'}",
    ]
    devices = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": devices, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    unhurt, hurt = flags.workdir / "unhurt", flags.workdir / "hurt"
    unhurt_seconds = timed(words, unhurt, environment)
    reports = sorted(path.relative_to(unhurt) for path in unhurt.rglob("results.csv"))
    start, happened, launches = time.monotonic(), collections.Counter[str](), 0
    with cluster(nodes=NODES) as found:
        environment |= {name: found[name] for name in ("SLURM_CONF", "PATH")}
        draw = random.Random(flags.seed)
        engine = ["launch", "--engine=slurm", "--slurm.partition=low", "--slurm.retries=5"]
        # If a job is killed more often than its retries allow, jobs that need it stop, and the user launches again.
        while not all((hurt / report).exists() for report in reports):
            launches += 1
            print(f"launch {launches}:", *output([*engine, *words], hurt, environment).splitlines()[-1:], flush=True)
            while slurm("squeue", environment, "-h"):
                time.sleep(draw.uniform(3, 20))
                if happened.total() < flags.events and (event := disturb(draw, hurt, environment)):
                    happened[event] += 1
    differing = [str(path) for path in reports if (hurt / path).read_bytes() != (unhurt / path).read_bytes()]
    if differing or not reports:
        sys.exit(f"{', '.join(differing) or 'no results.csv'}: not the same")
    jobs = len(list((hurt / "study").rglob("done.json")))
    print(f"\n{jobs} jobs; {', '.join(f'{count} times {event}' for event, count in sorted(happened.items()))}")
    print(
        f"{launches} launches; {unhurt_seconds:.0f} s unhurt in one process, {time.monotonic() - start:.0f} s on Slurm"
    )
    print(f"the same bytes: {', '.join(map(str, reports))}")


def timed(words: list[str], folder: Path, environment: Mapping[str, str]) -> float:
    """Runs a command in a folder; returns its duration in seconds."""
    start = time.monotonic()
    output(words, folder, environment)
    return time.monotonic() - start


def output(words: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """The output of a command in a folder; if it fails, exits with its last lines."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*COMMAND, *words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words}: exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def slurm(command: str, environment: Mapping[str, str], *words: str) -> str:
    """The output of a Slurm command."""
    return subprocess.run([command, *words], env=environment, capture_output=True, text=True, check=True).stdout


def disturb(draw: random.Random, folder: Path, environment: Mapping[str, str]) -> str | None:
    """Preempts, requeues or kills a running job; returns what it did, or None if no job was running."""
    running = slurm("squeue", environment, "-h", "-t", "R", "-p", "low", "-o", "%A").split()
    if not running:
        return None
    event = draw.choice(("preempted", "requeued", "killed"))
    if event == "preempted":
        nodes = str(draw.randint(1, NODES))
        slurm("sbatch", environment, "-p", "high", "-N", nodes, "-o", "/dev/null", "--wrap", "sleep 3")
    elif event == "requeued":
        # The job may have ended in the meantime.
        subprocess.run(["scontrol", "requeue", draw.choice(running)], env=environment, capture_output=True)
    else:
        processes = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if runs_in(path, folder)]
        if not processes:
            return None
        os.kill(draw.choice(processes), signal.SIGKILL)
    return event


def runs_in(path: Path, folder: Path) -> bool:
    """Whether a process of a Slurm job has this working folder and runs one of our commands."""
    try:
        command = (path.parent / "cmdline").read_bytes().split(b"\0")
        return (path.parent / "cwd").resolve() == folder.resolve() and COMMAND[0].encode() == command[0]
    except OSError:  # It has ended.
        return False


if __name__ == "__main__":
    main()
