"""The training loop: one for SFT, preference models and every arm, online or offline."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.errors import Interrupted
from alignment_gap.interruption import requested, watching
from alignment_gap.progress import NO_BAR, Bar
from alignment_gap.sharding import is_first_process
from alignment_gap.training.checkpoints import Checkpoints
from alignment_gap.training.guard import GuardConfig, check_progress
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
    skip: GuardConfig = GuardConfig(),
    refresh: Callable[[int, TrainState], TrainState] | None = None,
    record: Callable[[int, list[PreferenceBatch], bool], None] | None = None,
    bar: Bar = NO_BAR,
) -> TrainState:
    """Trains from the state's step up to the last of `checkpoint_steps`.

    Inside the loop nothing is copied between host and device but what is asked for explicitly.

    Args:
      state: of the start, or of the last checkpoint.
      update_step: from `make_update_step`.
      source: the batches.
      checkpoint_steps: increasing; the state is saved after each.
      checkpoints: where to.
      metrics_path: JSON lines, one per `log_every` steps.
      log_every: steps between two lines of metrics.
      skip: after how many skipped updates in a row to stop.
      refresh: changes the state's copies before a step, from `make_refresh`.
      record: is given the step, the batches since the last checkpoint, and whether the next one is due or an interim
        one; before it is saved.
      bar: shows the steps that are done, those of an earlier run included, and the loss.

    Raises:
      UserError: where too many updates in a row were skipped.
      Interrupted: where a signal asked for it; the state is saved at the step where it stood.
    """
    start = int(jax.device_get(state.step))
    if is_first_process():
        truncate_metrics(metrics_path, start)
    bar.update(start)
    recorded: list[PreferenceBatch] = []
    last_step, clock, clocked = checkpoint_steps[-1], time.perf_counter(), start
    with watching():
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
                line = metrics_line(metrics)
                rate = line["prompts"] * (done - clocked) / (time.perf_counter() - clock)
                append_metrics(metrics_path, {"step": done} | line | {"pairs_per_second": rate})
                bar.set_postfix(loss=f"{line['loss']:.4g}", refresh=False)
                check_progress(skip, int(line["skipped_in_a_row"]), done, line["loss"], line["gradient_norm"])
                clock, clocked = time.perf_counter(), done
            is_due, is_asked = done in checkpoint_steps, requested(done)
            if is_due or is_asked:
                if record:
                    record(done, recorded, is_due)
                    recorded = []
                checkpoints.save(state, interim=not is_due)
            if is_asked and done < last_step:
                raise Interrupted(f"saved at step {done} of {last_step}")
    return state


def metrics_line(metrics: Metrics) -> dict[str, float]:
    """The metrics of a step as numbers; waits for the step."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def append_metrics(path: Path, line: Mapping[str, float]) -> None:
    """Adds a line in the first process; what is not finite becomes null, which JSON can hold."""
    if is_first_process():
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with path.open("a") as file:
            file.write(json.dumps(finite) + "\n")


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
