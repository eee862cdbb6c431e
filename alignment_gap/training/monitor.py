"""Observes a run while it trains: metrics, times, validation, a profile, and a watchdog. It changes no result.

FOLDER/
  metrics.jsonl      a line for every `log_every` steps
  validation.jsonl   a line for each validation
  tensorboard/       the same for TensorBoard, if requested
  profile/           the trace of jax's profiler, if requested

If the folder is in a bucket, these files are on this machine first. They are copied to the bucket when the run is
saved, and at its end.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.folders import AnyPath, Outbox
from alignment_gap.sharding import fail_together, is_first_process
from alignment_gap.training.state import TrainState

METRICS, VALIDATION, TENSORBOARD, PROFILE = "metrics.jsonl", "validation.jsonl", "tensorboard", "profile"
# Model FLOPs utilisation of the update step, and the time from which it is computed.
MFU, _UPDATE = "mfu", "seconds_update"
# Names of metrics that report times. They differ between two runs of the same job.
_CLOCK = ("seconds_", "_per_second")


def is_of_the_clock(name: str) -> bool:
    """Whether a metric reports times."""
    return name.startswith(_CLOCK[0]) or name.endswith(_CLOCK[1]) or name == MFU


class Writer(Protocol):
    """The interface of clu's metric writers."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""

    def close(self) -> None:
        """Writes what is not yet written."""


class Validation(NamedTuple):
    """Metrics of a run on held-out examples.

    Attributes:
      every: steps between two validations; the last step also has one.
      measure: returns the metrics of a state; every process calls it.
      at_checkpoints: whether steps with a due checkpoint also have one.
    """

    every: int
    measure: Callable[[TrainState], Mapping[str, float]]
    at_checkpoints: bool = False


class Times:
    """Seconds per step, by what they are spent on.

    The host's waits are summed over all steps. The devices' times are measured on one step for each line of metrics:
    this process waits for the devices before and after that step. Every other step starts while the previous one runs.
    A call that serves several steps is measured once for each line, in whichever step it is made.
    """

    def __init__(self) -> None:
        self.measures = False
        self._measured: dict[str, float] = {}
        self._waited: dict[str, float] = {}

    def of_devices(self, name: str, function: Callable[..., Any], steps: int = 1) -> Callable[..., Any]:
        """Wraps the function so that its time counts on measured steps; a call may serve several steps."""

        def timed(*arguments: Any) -> Any:
            is_due = self.measures if steps == 1 else name not in self._measured
            if not is_due:
                return function(*arguments)
            jax.block_until_ready(arguments)
            start = time.perf_counter()
            result = jax.block_until_ready(function(*arguments))
            self._measured[name] = self._measured.get(name, 0.0) + (time.perf_counter() - start) / steps
            return result

        return timed

    def of_host(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps the function so that its time counts on every step."""

        def timed(*arguments: Any, **settings: Any) -> Any:
            with self.waiting(name):
                return function(*arguments, **settings)

        return timed

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """The time inside this context counts on every step."""
        start = time.perf_counter()
        yield
        self._waited[name] = self._waited.get(name, 0.0) + time.perf_counter() - start

    def line(self, steps: int) -> dict[str, float]:
        """Seconds per step over `steps`, the steps since the last line; resets. If 0, omits the host's waits."""
        waited = {name: seconds / steps for name, seconds in self._waited.items() if steps}
        found = {f"seconds_{name}": seconds for name, seconds in (waited | self._measured).items()}
        self.forget()
        return found

    def forget(self) -> None:
        """Discards all measured times."""
        self._measured, self._waited, self.measures = {}, {}, False


class Monitor:
    """Observes a run; the first process writes the files.

    Attributes:
      folder: folder of the run; for a bucket, the folder on this machine from which files are copied there.
      times: times of the parts of a step, including the source's functions.
    """

    def __init__(
        self,
        folder: AnyPath,
        *,
        tensorboard: bool = False,
        profile: tuple[int, int] | None = None,
        validation: Validation | None = None,
        hang_after: float | None = None,
        least_seconds: Callable[[PreferenceBatch], float] | None = None,
        learning_rate: Callable[[int], Any] | None = None,
        counts: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Sets what to observe.

        Args:
          folder: folder of the run.
          tensorboard: whether to write the lines for TensorBoard too.
          profile: the first and the last step for jax's profiler, counted from 1.
          validation: validation on held-out examples; None for no validation.
          hang_after: the watchdog ends the run after this many seconds without a step; None for never.
          least_seconds: seconds for a batch's update at the devices' peak; None if unknown.
          learning_rate: maps the number of earlier updates to the learning rate; None omits it from the metrics.
          counts: returns other metrics since the last line; every process calls it.
        """
        self._outbox, self.times = Outbox(folder), Times()
        self.folder = self._outbox.folder
        self._profile, self._validation, self._hang_after = profile, validation, hang_after
        self._wants_tensorboard, self._least_seconds = tensorboard, least_seconds
        self._learning_rate, self._counts = learning_rate, counts
        self._writer: Writer | None = None
        self._is_profiled = False
        self._last, self._alive = 0, time.monotonic()

    @contextlib.contextmanager
    def running(self, start: int) -> Iterator[None]:
        """The context of a run that continues from step `start`; drops lines of later steps, which a kill left."""
        self._last, self._alive = start, time.monotonic()
        if is_first_process():
            self._outbox.fetch(METRICS, VALIDATION)
            for name in (METRICS, VALIDATION):
                truncate_metrics(self.folder / name, start)
            if self._wants_tensorboard:
                from alignment_gap.training.tensorboard import open_writer

                self._writer = open_writer(self.folder / TENSORBOARD)
        ended = threading.Event()
        if self._hang_after is not None:
            threading.Thread(target=self._watch, args=(ended, self._hang_after), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            self._stop_profile()
            if self._writer:
                self._writer.close()
            self.saved()

    def saved(self) -> None:
        """Call it after a save; it copies new lines to a folder in a bucket."""
        if is_first_process():
            self._outbox.send()

    def begin(self, step: int, state: TrainState, *, is_logged: bool) -> None:
        """Call it before each step; steps count from 1."""
        if is_logged:
            jax.block_until_ready(state)
            self.times.measures = True
        if self._profile and step == self._profile[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder / PROFILE)
            self._is_profiled = True

    def end(self, step: int, state: TrainState, *, is_last: bool, is_due: bool = False) -> Mapping[str, float] | None:
        """Call it after each step, before its checkpoint.

        Args:
          step: number of the finished step.
          state: the state after it.
          is_last: whether it is the run's last step.
          is_due: whether a checkpoint is due.

        Returns:
          The metrics of the validation; None if there was no validation.
        """
        self._last, self._alive = step, time.monotonic()
        if self._is_profiled and self._profile and (step == self._profile[1] or is_last):
            jax.block_until_ready(state)
            self._stop_profile()
        validation = self._validation
        if validation is None or not (
            is_last or step % validation.every == 0 or (is_due and validation.at_checkpoints)
        ):
            return None
        with self.times.waiting("validation"):
            found = validation.measure(state)
        self._append(VALIDATION, step, found)
        self._alive = time.monotonic()
        return found

    def utilisation(self, batch: PreferenceBatch, line: Mapping[str, float]) -> dict[str, float]:
        """MFU of a batch's update, from the time in the metrics line; empty if the time or the peak is unknown."""
        if self._least_seconds is None or _UPDATE not in line:
            return {}
        return {MFU: self._least_seconds(batch) / line[_UPDATE]}

    def write(self, step: int, line: Mapping[str, float]) -> None:
        """Writes a line of metrics, with the counts and the learning rate of the last update that was made."""
        line = {**line, **self._counts()}
        if self._learning_rate is not None:
            made = step - int(line.get("skipped", 0))
            line = {**line, "learning_rate": float(self._learning_rate(max(made - 1, 0)))}
        self._append(METRICS, step, line)

    def _append(self, name: str, step: int, line: Mapping[str, float]) -> None:
        if not is_first_process():
            return
        # JSON cannot hold nan and infinity; they become null.
        finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
        with (self.folder / name).open("a") as file:
            file.write(json.dumps({"step": step} | finite) + "\n")
        if self._writer:
            group = "validation/" if name == VALIDATION else ""
            self._writer.write_scalars(step, {group + key: value for key, value in line.items()})

    def _stop_profile(self) -> None:
        if self._is_profiled:
            jax.profiler.stop_trace()
            self._is_profiled = False

    def _watch(self, ended: threading.Event, limit: float) -> None:
        look_every, looked = min(limit / 10, 5.0), time.monotonic()
        while not ended.wait(look_every):
            now, before, looked = time.monotonic(), looked, time.monotonic()
            if now - before > limit / 2:
                self._alive = now  # The whole process was suspended, for example on a sleeping laptop.
            if now - self._alive > limit:
                line = f"no step was done for {limit:g} s after step {self._last}: see above where each thread waits"

                def show(line: str = line) -> None:
                    faulthandler.dump_traceback(all_threads=True)
                    print(f"\nerror: {line}", file=sys.stderr, flush=True)

                fail_together(line, show, status=1)
                show()
                os._exit(1)


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which a resumed run writes again, and a last line that a kill cut short."""
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
