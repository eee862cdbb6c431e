"""Kills commands with signal 9 at random moments, runs them again, and compares all bytes with an undisturbed run.

python benchmarks/kills.py --chain study --kills 50

The chain first runs once without kills, to measure how long each command takes. Then it runs again and again. Each
command is killed at random moments within its time, including start-up, until it was killed `--kills` times. After
every pass, everything is compared: all files must be the same except for durations, and so must all arrays of
checkpoints.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from alignment_gap.checkpoints.layout import open_store
from alignment_gap.launch.local import free_port
from alignment_gap.launch.tasks import COMMAND
from alignment_gap.training.monitor import is_of_the_clock

ROOT = Path(__file__).parents[1]
TINY = (
    "--gin.T5Config.width=16 --gin.T5Config.encoder_layers=1 --gin.T5Config.decoder_layers=1 --gin.T5Config.heads=2 "
    "--gin.T5Config.head_size=8 --gin.T5Config.mlp_width=16"
)
TRAIN = "train --gin.BATCH_SIZE=16 --gin.WARMUP_STEPS=0 --gin.CHECKPOINT_EVERY=3 --gin.TRAIN_STEPS=12"
MEASURE = "--judges=golden=golden,proxy=proxy --prompts=32 --kl_prompts=16 --pairs=16 --batch_size=16"


def prepare(source: str, vocabulary: str | None) -> str:
    """The command that prepares the pairs of the chain of jobs."""
    given = f"--source={source}" + (f" --vocabulary={vocabulary}" if vocabulary else "")
    lengths = "--prompt_length=64 --response_length=24 --bad_pairs=drop --validation=0.1"
    return f"data prepare {given} " + ("--posts.pairs=2000" if source == "posts" else lengths) + " --output=prepared"


def jobs(source: str, vocabulary: str | None) -> list[str]:
    """The README's way from pairs to policies, with short jobs."""
    return [
        prepare(source, vocabulary),
        "data compose --datasets=prepared/train --limit=512 --output=pairs",
        f"{TRAIN} --gin_file=runs/sft.gin --gin.DATASET=pairs {TINY} --workdir=sft"
        + ("" if vocabulary else " --gin.VOCABULARY_SIZE=136"),
        f"{TRAIN} --gin_file=runs/preference_model.gin --gin.DATASET=pairs --gin.START=sft --workdir=golden",
        "data label --dataset=pairs --judge=golden --batch_size=16 --output=golden_pairs",
        f"{TRAIN} --gin_file=runs/preference_model.gin --gin.DATASET=golden_pairs --gin.START=sft --workdir=proxy",
        "data generate --prompts=pairs --policies=sft --judge=proxy --limit=64 --batch_size=16 --output=drawn",
        "data compose --datasets=golden_pairs,drawn --weights=3,1 --output=mixed",
        f"{TRAIN} --gin_file=runs/offline_ipo.gin --gin.DATASET=mixed --gin.START=sft --workdir=offline",
        f"{TRAIN} --gin_file=runs/online_ipo.gin --gin.PROMPTS=golden_pairs --gin.START=sft --gin.JUDGE=proxy "
        "--workdir=online",
        f"evaluate --run=online --dataset=prepared/validation {MEASURE} --opponents=offline=offline,sft=sft "
        "--output=measured",
    ]


def main() -> None:
    """Runs a chain of commands with and without kills, and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chain", choices=("prepare", "jobs", "study"), default="jobs")
    parser.add_argument("--kills", type=int, default=3, help="kills of each command")
    parser.add_argument("--processes", type=int, default=1, help="processes of each command except prepare")
    parser.add_argument("--source", default="posts", help="source of the pairs, as for data prepare")
    parser.add_argument("--vocabulary", help="vocabulary of the pairs, as for data prepare")
    parser.add_argument("--config", default="tests/study/nano.py", help="config of the study")
    parser.add_argument("--workdir", type=Path, default=ROOT / ".cache" / "kills", help="removed at the start")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    paths = [None if path is None else os.path.abspath(path) for path in (flags.source, flags.vocabulary)]
    source = "posts" if flags.source == "posts" else paths[0]
    chain = {
        "prepare": [prepare(source, paths[1])],
        "jobs": jobs(source, paths[1]),
        "study": [f"study --config={os.path.abspath(flags.config)} --workdir=study"],
    }[flags.chain]
    shutil.rmtree(flags.workdir, ignore_errors=True)
    unhurt, draw = flags.workdir / "unhurt", random.Random(flags.seed)
    seconds = [run(command, unhurt, flags.processes)[1] for command in chain]
    expected = contents(unhurt)
    killed: collections.Counter[str] = collections.Counter()
    passes = 0
    while killed.total() < flags.kills * len(chain):
        folder, passes = flags.workdir / f"killed{passes}", passes + 1
        for command, longest in zip(chain, seconds, strict=True):
            while killed[command] < flags.kills:
                if run(command, folder, flags.processes, after=draw.uniform(0, longest))[0] != -signal.SIGKILL:
                    break
                killed[command] += 1
            else:
                run(command, folder, flags.processes)
        compare(contents(folder), expected)
        shutil.rmtree(folder)
    print(f"{killed.total()} kills in {passes} runs of the chain; {len(expected)} files and arrays are the same")
    print("\n| command | seconds | kills |\n| --- | ---: | ---: |")
    for command, longest in zip(chain, seconds, strict=True):
        print(f"| `{command.replace(str(ROOT) + os.sep, '')}` | {longest:.1f} | {killed[command]} |")


def run(command: str, folder: Path, processes: int, after: float | None = None) -> tuple[int, float]:
    """Runs a command in a folder; returns the exit status of its first process and its duration in seconds.

    If `after` is given, all its processes are killed with signal 9 after this many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = shlex.split(command)
    count = 1 if words[:2] == ["data", "prepare"] else processes
    if words[:2] != ["data", "prepare"]:
        words.append(f"--compilation_cache={ROOT / '.cache' / 'jax-kills'}")
    devices = f"--xla_force_host_platform_device_count={8 // count} --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": devices, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"] if count > 1 else []
    start, log = time.monotonic(), (folder / "log.txt").open("a")
    started = [
        subprocess.Popen(
            [*COMMAND, *words, *together, *([f"--process={number}"] if together else [])],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
        )
        for number in range(count)
    ]
    try:
        started[0].wait(after)
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
    statuses = [process.wait() for process in started]
    log.close()
    if not {*statuses} <= {0, -signal.SIGKILL}:
        sys.exit(
            f"{command}: exit status {statuses}:\n" + "\n".join((folder / "log.txt").read_text().splitlines()[-5:])
        )
    return statuses[0], time.monotonic() - start


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file without the folder's path and durations, and of every array of a checkpoint."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            if path.parent.name == "checkpoints" and path.name.isdigit():
                for store in ("params", "optimizer", "copies"):
                    if (path / store).exists():
                        arrays = open_store(path / store).items()
                        found |= {f"{name}/{store}/{key}": tensor.read(None).tobytes() for key, tensor in arrays}
        elif "/checkpoints/" not in name and path.name not in (".lock", "log.txt"):
            found[name] = without_durations(path.name, path.read_bytes()).replace(str(folder).encode(), b"FOLDER")
    return found


def without_durations(name: str, content: bytes) -> bytes:
    """The content of a job's file without times and durations."""
    if name == "done.json":
        return json.dumps(json.loads(content) | {"seconds": 0}).encode()
    if name == "metrics.jsonl":
        lines = [
            {name: value for name, value in json.loads(line).items() if not is_of_the_clock(name)}
            for line in content.decode().splitlines()
        ]
        return json.dumps(lines).encode()
    if name == "report.html":
        return re.sub(rb"<td class=\"number\">\d+:\d\d:\d\d</td>", b"", content)
    return content


def compare(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Exits with the first names that differ, or that only one of the two runs has."""
    differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    if differing:
        sys.exit(f"{len(differing)} of {len(expected)} files and arrays differ, such as {', '.join(differing[:5])}")


if __name__ == "__main__":
    main()
