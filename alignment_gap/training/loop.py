"""The training loop: one for SFT, preference models and every arm, online or offline."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.errors import UserError
from alignment_gap.progress import NO_BAR, Bar
from alignment_gap.sharding import is_first_process
from alignment_gap.training.checkpoints import Checkpoints
from alignment_gap.training.sources import Source
from alignment_gap.training.state import TrainState
from alignment_gap.training.update import Metrics, UpdateStep


def train(
    state: TrainState,
    update_step: UpdateStep,
    source: Source,
    *,
    checkpoint_steps: Sequence[int],
    checkpoints: Checkpoints,
    metrics_path: Path,
    log_every: int = 20,
    refresh: Callable[[int, TrainState], TrainState] | None = None,
    record: Callable[[int, list[PreferenceBatch]], None] | None = None,
    bar: Bar = NO_BAR,
) -> TrainState:
    """Trains up to the last of `checkpoint_steps`; from the last complete checkpoint where there is one.

    Inside the loop nothing is copied between host and device but what is asked for explicitly.

    Args:
      state: at step 0; where there is a checkpoint, its shapes and shardings are enough.
      update_step: from `make_update_step`.
      source: the batches.
      checkpoint_steps: increasing; the state is saved after each.
      checkpoints: where to.
      metrics_path: JSON lines, one per `log_every` steps.
      log_every: steps between two lines of metrics.
      refresh: changes the state's copies before a step, from `make_refresh`.
      record: is given the step and the batches since the last checkpoint, before this one is saved.
      bar: shows the steps that are done, those of an earlier run included, and the loss.

    Raises:
      UserError: where loss or gradient are no longer finite; no such state is saved.
    """
    start = checkpoints.steps()[-1] if checkpoints.steps() else 0
    if start:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = checkpoints.restore(abstract, start)
    if is_first_process():
        truncate_metrics(metrics_path, start)
    bar.update(start)
    recorded: list[PreferenceBatch] = []
    last_step, clock, clocked = checkpoint_steps[-1], time.perf_counter(), start
    for step in range(start, last_step):
        with jax.transfer_guard("disallow"):
            state = refresh(step, state) if refresh else state
            batch = source(step, state)
            state, metrics = update_step(state, batch)
        if record:
            recorded.append(batch)
        if step == start:
            bar.unpause()  # The rate counts from here: what came before was compiling.
        bar.update(1)
        done = step + 1
        if done % log_every == 0 or done == last_step:
            prompts = float(jax.device_get(metrics["prompts"])) * (done - clocked)
            append_metrics(metrics_path, done, metrics, pairs_per_second=prompts / (time.perf_counter() - clock))
            bar.set_postfix(loss=f"{float(jax.device_get(metrics['loss'])):.4g}", refresh=False)
            clock, clocked = time.perf_counter(), done
        if done in checkpoint_steps:
            check_finite(metrics, done)
            if record:
                record(done, recorded)
                recorded = []
            checkpoints.save(state)
    return state


def append_metrics(path: Path, step: int, metrics: Metrics, **more: float) -> None:
    """Adds a line; raises UserError where loss or gradient are not finite."""
    line = {"step": step} | {name: float(value) for name, value in jax.device_get(metrics).items()} | more
    if is_first_process():
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    check_finite(metrics, step)


def check_finite(metrics: Metrics, step: int) -> None:
    """Raises UserError where loss or gradient are not finite: the parameters are lost with either."""
    for name in ("loss", "gradient_norm"):
        value = float(jax.device_get(metrics[name]))
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {step}: lower learning_rate or clip_norm, then start again; "
                "training goes on from the last checkpoint"
            )


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which a resumed run writes again; a line that a kill cut short goes with them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    shortened = path.with_suffix(".partial")
    shortened.write_text("".join(kept))
    os.replace(shortened, path)
