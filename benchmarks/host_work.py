"""Measures the work of the training loop on the host between steps, as a share of a step.

    python benchmarks/host_work.py

Runs whole jobs in this process, as `alignment-gap train` does by default: with prefetching, a line of metrics every 20
steps, and a checkpoint every 200. The clock measures the time of a step. The host's work is the CPU time of the loop's
own thread, which does not count while it waits for the devices; the devices of a CPU compute in other threads. Reading
and putting batches ahead, and writing checkpoints, happen in other threads too. The first step compiles and is not
counted.

The loop calls a step before the previous one has ended, so this work is the most that devices wait for, not what they
wait for. The online job has a judge on the devices.

A second table is about the record of an online job. Its samples become bytes in every step, while the devices run the
next one; a save writes the bytes, and the devices wait for it. The table has both for 199 steps, almost a full file.

On a machine with other work a step takes longer, so that the share is too small: use an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import PostsConfig, TextSourceConfig
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.jobs.folder import make
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.record import Recorder
from alignment_gap.jobs.train import TRAIN
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import sizes
from alignment_gap.progress import NO_BAR


class Clock:
    """A progress bar that notes the time and the thread's CPU time after every step."""

    def __init__(self) -> None:
        self.notes: list[tuple[float, float]] = []

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends nothing."""

    def update(self, steps: int) -> None:
        """Notes the times."""
        self.notes += [(time.perf_counter(), time.thread_time())] * steps

    def unpause(self) -> None:
        """Forgets the first step."""
        self.notes.clear()

    def write(self, line: str) -> None:
        """Shows nothing."""

    def set_postfix(self, **values: object) -> None:
        """Shows nothing."""

    def per_step(self) -> tuple[float, float]:
        """Seconds of a step, and of the host's work in it."""
        (start, worked), (end, done) = self.notes[0], self.notes[-1]
        return (end - start) / (len(self.notes) - 1), (done - worked) / (len(self.notes) - 1)


def run(config: JobConfig, folder: Path) -> tuple[float, float]:
    """Runs a job; the seconds of a step, and of the host's work in it."""
    clock = Clock()
    make(TRAIN, config, folder, lambda total, name, unit: clock)
    return clock.per_step()


def recording(prompts: int, folder: Path) -> tuple[float, float]:
    """Seconds to encode the samples of 199 steps, and to write them: pairs of 60 and twice 30 tokens."""
    rng = np.random.default_rng(0)
    responses = rng.integers(2, 100, (prompts, 2, 30), np.int32)
    batch = PreferenceBatch(
        prompt_ids=np.arange(prompts, dtype=np.int32),
        prompts=rng.integers(2, 100, (prompts, 60), np.int32),
        prompt_lengths=np.full(prompts, 60, np.int32),
        responses=responses,
        response_lengths=np.full((prompts, 2), 30, np.int32),
        scores=rng.random((prompts, 2), np.float32),
        sampler_log_probs=-rng.random(responses.shape, np.float32),
    )
    recorder = Recorder(folder, 0, beside=False)
    start = time.perf_counter()
    for step in range(1, 200):
        recorder.add(step, batch)
    added = time.perf_counter()
    recorder.save()
    return added - start, time.perf_counter() - added


def main() -> None:
    """Runs fine-tuning, a preference model, an offline and an online job, and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="t5_300k", help="size of the policy")
    parser.add_argument("--batch", type=int, default=32, help="prompts of a step")
    parser.add_argument("--steps", type=int, default=401, help="steps of each job")
    options = parser.parse_args()
    model = sizes.get(options.model, vocabulary_size=136)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        posts = TextSourceConfig(location="posts", posts=PostsConfig(pairs=2000, validation_pairs=10))
        make(PREPARE, PrepareConfig(posts), root / "data", lambda *_: NO_BAR)
        pairs = DatasetConfig(str(root / "data" / "train"), batch_size=options.batch)
        sft = JobConfig(model=model, loss=LossConfig("sft"), source=pairs, steps=options.steps)
        offline = JobConfig(start=str(root / "sft"), source=pairs, steps=options.steps)
        golden = dataclasses.replace(offline, kind="pairwise")
        judge = JudgeConfig(str(root / "golden"))
        online = dataclasses.replace(offline, source=OnlineConfig(pairs, judge=judge))
        # The first save of a process prepares what later saves use, which takes almost a second.
        run(dataclasses.replace(sft, steps=3, checkpoint_every=1), root / "first")
        print(
            f"{options.model}, {options.batch} prompts a step, jax {jax.__version__}, {jax.devices()[0].device_kind}\n"
        )
        print("| job | a step, ms | host work, ms | share |\n| --- | --- | --- | --- |")
        for job, config in (("sft", sft), ("golden", golden), ("offline", offline), ("online", online)):
            step, host = run(config, root / job)
            print(f"| {job} | {1e3 * step:.1f} | {1e3 * host:.2f} | {host / step:.2%} |", flush=True)
        print("\n| prompts a step | encoding, ms in all | a save waits, ms |\n| --- | --- | --- |")
        for prompts in (32, 512):
            encoding, writing = recording(prompts, root / f"record-{prompts}")
            print(f"| {prompts} | {1e3 * encoding:.0f} | {1e3 * writing:.0f} |")


if __name__ == "__main__":
    main()
