"""Runs a study of several seeds and sizes on a real Slurm, hurts it on the way, and compares it with an unhurt run.

python benchmarks/slurm_study.py --seeds 3 --events 24

The unhurt study runs in one process. Then the same study is launched on a Slurm of three nodes on this machine, which
tests/launch/slurm_cluster.py starts. At random moments the jobs that run there are preempted by jobs of a higher
priority, requeued, or killed with signal 9. Every results.csv has to be the same, byte for byte.
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
    """Runs both studies and prints what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tests/study/nano.py", help="of the study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", default="palm_30k,palm_300k")
    parser.add_argument("--events", type=int, default=24, help="how often the study is hurt")
    parser.add_argument("--workdir", type=Path, default=ROOT / ".cache" / "slurm_study", help="removed at the start")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of what happens")
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
        # A job that was killed more often than its retries stops what needs it. The user launches what is left again.
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
    """Runs a command in a folder; gives its seconds."""
    start = time.monotonic()
    output(words, folder, environment)
    return time.monotonic() - start


def output(words: list[str], folder: Path, environment: Mapping[str, str]) -> str:
    """What a command in a folder prints; ends with its last lines where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*COMMAND, *words], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words}: exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def slurm(command: str, environment: Mapping[str, str], *words: str) -> str:
    """What a command of Slurm prints."""
    return subprocess.run([command, *words], env=environment, capture_output=True, text=True, check=True).stdout


def disturb(draw: random.Random, folder: Path, environment: Mapping[str, str]) -> str | None:
    """Preempts, requeues or kills what runs; says which, None where nothing ran."""
    running = slurm("squeue", environment, "-h", "-t", "R", "-p", "low", "-o", "%A").split()
    if not running:
        return None
    event = draw.choice(("preempted", "requeued", "killed"))
    if event == "preempted":
        nodes = str(draw.randint(1, NODES))
        slurm("sbatch", environment, "-p", "high", "-N", nodes, "-o", "/dev/null", "--wrap", "sleep 3")
    elif event == "requeued":
        # The job may have ended meanwhile.
        subprocess.run(["scontrol", "requeue", draw.choice(running)], env=environment, capture_output=True)
    else:
        processes = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/environ") if runs_in(path, folder)]
        if not processes:
            return None
        os.kill(draw.choice(processes), signal.SIGKILL)
    return event


def runs_in(path: Path, folder: Path) -> bool:
    """Whether a process of a job of Slurm has a folder as its own and is one of our commands."""
    try:
        command = (path.parent / "cmdline").read_bytes().split(b"\0")
        return (path.parent / "cwd").resolve() == folder.resolve() and COMMAND[0].encode() == command[0]
    except OSError:  # It has ended.
        return False


if __name__ == "__main__":
    main()
