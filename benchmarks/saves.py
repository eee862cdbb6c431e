"""Measures the cost of a save: update steps with and without a save, in pairs of windows in one process.

    python benchmarks/saves.py

A window is a number of update steps in a row; each step is waited for. One window of a pair begins with a save, called
as in the training loop, and the other does not. Which comes first alternates. A window starts after all earlier writes
have ended. Every figure is the median over the pairs, with the lowest and the highest:

- "save" is the duration of the call, in steps: digests, and the copy to the host. The loop waits for it.
- "while it is written": the time of a step before the checkpoint is whole, divided by that of a step without a save.
- "a window": the time of a window with its save, divided by that of the window without a save.

On a machine with other work, the ratios of a pair are meaningful, but milliseconds are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from update_step import SIZES, assembly_of, random_batch

from alignment_gap.checkpoints import CHECKPOINTS
from alignment_gap.models import count_parameters, make_policy
from alignment_gap.sharding import put_batch
from alignment_gap.training import Checkpoints, TrainState, UpdateStep, create_state


@dataclasses.dataclass
class Window:
    """Seconds of a window's save and of each of its steps, and how many steps began before the checkpoint was whole."""

    save: float
    steps: list[float]
    written_during: int

    @property
    def seconds(self) -> float:
        """Duration of the whole window."""
        return self.save + sum(self.steps)


def run_window(
    update_step: UpdateStep, state: TrainState, batch: Any, steps: int, folder: Path | None
) -> tuple[TrainState, Window]:
    """Runs a window; returns the state and the times. If a folder is given, the state is first saved there."""
    with Checkpoints(folder or Path("nowhere")) as checkpoints:
        start = time.perf_counter()
        if folder is not None:
            checkpoints.save(state)
        found = Window(time.perf_counter() - start, [], 0)
        whole = (folder or Path("nowhere")) / str(int(state.step))
        for _ in range(steps):
            found.written_during += folder is not None and not whole.exists()
            start = time.perf_counter()
            state, metrics = update_step(state, batch)
            jax.block_until_ready((state, metrics))
            found.steps.append(time.perf_counter() - start)
    return state, found


def run_pairs(options: argparse.Namespace) -> tuple[list[tuple[Window, Window]], float]:
    """The windows with and without a save of each pair, and the size of a checkpoint in MB."""
    assembly = assembly_of(SIZES[options.size][options.policy], options)
    batch = random_batch(options)
    batch = dataclasses.replace(batch, reference_log_probs=np.zeros(batch.responses.shape, np.float32))
    batch = put_batch(batch, assembly.mesh, options.batch)
    state = create_state(assembly.policy.init, assembly.abstract, assembly.optimizer, jax.random.key(0))
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.pairs + 1):
            there = Path(folder) / str(number) / CHECKPOINTS
            state, first = run_window(assembly.update_step, state, batch, options.steps, there if number % 2 else None)
            state, second = run_window(assembly.update_step, state, batch, options.steps, None if number % 2 else there)
            pairs.append((first, second) if number % 2 else (second, first))
        written = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
    # The first pair compiles.
    return pairs[1:], written / 1e6


def spread(values: Sequence[float]) -> str:
    """The median, the lowest and the highest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Prints a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--policy", choices=("t5", "decoder"), default="t5")
    parser.add_argument("--batch", type=int, default=8, help="prompts, each with two responses")
    parser.add_argument("--prompt-length", type=int, default=48, help="tokens")
    parser.add_argument("--response-length", type=int, default=12, help="tokens")
    parser.add_argument("--steps", type=int, default=10, help="steps per window")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    pairs, written = run_pairs(options)
    plain = [statistics.median(without.steps) for _, without in pairs]
    during = [
        statistics.median(saved.steps[: saved.written_during]) / step
        for (saved, _), step in zip(pairs, plain, strict=True)
        if saved.written_during
    ]
    cells = {
        "policy": f"{options.policy}, {options.size}",
        "parameters": f"{count_parameters(make_policy(SIZES[options.size][options.policy])):,}",
        "checkpoint, MB": f"{written:.0f}",
        "step, ms": spread([1e3 * step for step in plain]),
        "save, in steps": spread([saved.save / step for (saved, _), step in zip(pairs, plain, strict=True)]),
        "steps while it is written": spread([saved.written_during for saved, _ in pairs]),
        "while it is written": spread(during) if during else "-",
        f"a window of {options.steps}": spread([saved.seconds / without.seconds for saved, without in pairs]),
    }
    print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    print("\n| " + " | ".join(cells) + " |\n|" + " --- |" * len(cells) + "\n| " + " | ".join(cells.values()) + " |")


if __name__ == "__main__":
    main()
