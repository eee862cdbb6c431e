"""The training loop, the same for SFT, preference models and every arm, online or offline."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.errors import Interrupted
from alignment_gap.interruption import requested, watching
from alignment_gap.progress import NO_BAR, Bar
from alignment_gap.sharding import to_host
from alignment_gap.training.checkpoints import Checkpoints
from alignment_gap.training.guard import GuardConfig, check_progress, tell_skipped
from alignment_gap.training.monitor import Monitor
from alignment_gap.training.sources import Source
from alignment_gap.training.state import TrainState
from alignment_gap.training.update import Metrics, UpdateStep

# Metrics of a step that are also reported per second, and the names of these rates.
_RATES = (("prompts", "pairs"), ("tokens", "tokens"))


@runtime_checkable
class Recorder(Protocol):
    """Keeps the batches of a run."""

    def add(self, step: int, batch: PreferenceBatch) -> None:
        """Takes the batch of a step, as whole numpy arrays."""

    def save(self) -> None:
        """Writes what was added to disk; called before each save of the state."""


def train(
    state: TrainState,
    update_step: UpdateStep,
    source: Source,
    *,
    checkpoint_steps: Sequence[int],
    checkpoints: Checkpoints,
    monitor: Monitor,
    log_every: int = 20,
    skip: GuardConfig = GuardConfig(),
    refresh: Callable[[int, TrainState], TrainState] = lambda step, state: state,
    recorder: Recorder | None = None,
    bar: Bar = NO_BAR,
) -> TrainState:
    """Trains from the state's step up to the last of `checkpoint_steps`.

    Inside the loop, only explicit transfers copy data between host and device.

    Args:
      state: the state at the start, or from the last checkpoint.
      update_step: from `make_update_step`.
      source: gives the batches.
      checkpoint_steps: increasing; the state is saved after each of these steps.
      checkpoints: saves the state.
      monitor: writes metrics and other observations of the run.
      log_every: steps between two lines of metrics.
      skip: sets how many skipped updates in a row stop the run.
      refresh: updates the state's copies before a step, from `make_refresh` and `make_moving`.
      recorder: keeps the batch of every step.
      bar: shows the loss and the number of finished steps, including steps of an earlier run.

    Raises:
      UserError: too many updates in a row were skipped.
      Interrupted: a signal asked the run to end; the state is saved at the current step.
    """
    start = int(jax.device_get(state.step))
    bar.update(start)
    update_step, save = monitor.times.of_devices("update", update_step), monitor.times.of_host("save", checkpoints.save)
    drawn: PreferenceBatch | None = None
    last_step, clock, clocked = checkpoint_steps[-1], time.perf_counter(), start
    with watching(), monitor.running(start):
        for step in range(start, last_step):
            done = step + 1
            is_logged = done % log_every == 0 or done == last_step
            # The first step compiles, so it is not timed.
            monitor.begin(done, state, is_logged=is_logged and step > start)
            with jax.transfer_guard("disallow"):
                state = refresh(step, state)
                batch = source(step, state)
                state, metrics = update_step(state, batch)
            if recorder:
                # One step late, so that the devices already run the next step meanwhile.
                if drawn is not None:
                    recorder.add(step, to_host(drawn))
                drawn = batch
            if step == start:
                # Rates and times count from here; the time before was spent compiling.
                jax.block_until_ready(metrics)
                bar.unpause()
                monitor.times.forget()
                clock, clocked = time.perf_counter(), done
            bar.update(1)
            if is_logged:
                line, steps = metrics_line(metrics), done - clocked
                line |= _rates(line, steps, time.perf_counter() - clock) | monitor.times.line(steps)
                monitor.write(done, line | monitor.utilisation(batch, line))
                bar.set_postfix(loss=f"{line['loss']:.4g}", refresh=False)
                check_progress(skip, int(line["skipped_in_a_row"]), done, line["loss"], line["gradient_norm"])
                clock, clocked = time.perf_counter(), done
            is_due = done in checkpoint_steps
            validated = monitor.end(done, state, is_last=done == last_step, is_due=is_due)
            is_asked = requested(done)
            if is_due or is_asked:
                if recorder:
                    assert drawn is not None
                    recorder.add(done, to_host(drawn))
                    recorder.save()
                    drawn = None
                save(state, interim=not is_due, metrics=validated)
                monitor.saved()
            if is_asked and done < last_step:
                raise Interrupted(f"saved at step {done} of {last_step}")
    tell_skipped(state.skipped, last_step, bar.write)
    return state


def _rates(line: Mapping[str, float], steps: int, seconds: float) -> dict[str, float]:
    """Prompts and tokens trained per second; empty if no step was timed."""
    there = [(name, what) for name, what in _RATES if name in line and steps]
    return {f"{what}_per_second": line[name] * steps / seconds for name, what in there}


def metrics_line(metrics: Metrics) -> dict[str, float]:
    """The metrics of a step as numbers; waits for the step."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
