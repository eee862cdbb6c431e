"""Observes a run while it trains: metrics, times, validation, a profile, and a watchdog. It changes no result.

FOLDER/
  metrics.jsonl      a line per `log_every` steps
  validation.jsonl   a line per validation
  tensorboard/       the same for TensorBoard, where that is asked for
  profile/           the trace of jax's profiler, where that is asked for

Of a folder in a bucket these files are on this machine; they are copied there when the run is saved, and at its end.
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
# Model FLOPs utilisation of the update step, and the time that it follows from.
MFU, _UPDATE = "mfu", "seconds_update"
# Names of metrics that tell times. These differ between two runs of one job.
_CLOCK = ("seconds_", "_per_second")


def is_of_the_clock(name: str) -> bool:
    """Whether a metric tells times."""
    return name.startswith(_CLOCK[0]) or name.endswith(_CLOCK[1]) or name == MFU


class Writer(Protocol):
    """What clu's writers of metrics have."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """The metrics of a step."""

    def close(self) -> None:
        """Writes what is left."""


class Validation(NamedTuple):
    """Metrics of a run on held-out examples.

    Attributes:
      every: steps between two validations; the last step has one too.
      measure: gives the metrics of a state; every process calls it.
      at_checkpoints: whether a step that a checkpoint is due at has one too.
    """

    every: int
    measure: Callable[[TrainState], Mapping[str, float]]
    at_checkpoints: bool = False


class Times:
    """Seconds a step by what they go to.

    The host's waits are summed over all steps. The devices' times are measured on one step for each line of metrics:
    this process waits for the devices before and after that step. All other steps start while the last still runs.
    """

    def __init__(self) -> None:
        self.measures = False
        self._measured: dict[str, float] = {}
        self._waited: dict[str, float] = {}

    def of_devices(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts where a step is measured."""

        def timed(*arguments: Any) -> Any:
            if not self.measures:
                return function(*arguments)
            start = time.perf_counter()
            result = jax.block_until_ready(function(*arguments))
            self._measured[name] = self._measured.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed

    def of_host(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts in every step."""

        def timed(*arguments: Any, **settings: Any) -> Any:
            with self.waiting(name):
                return function(*arguments, **settings)

        return timed

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """What is done inside counts in every step."""
        start = time.perf_counter()
        yield
        self._waited[name] = self._waited.get(name, 0.0) + time.perf_counter() - start

    def line(self, steps: int) -> dict[str, float]:
        """Seconds a step over so many steps since the last line, and begins anew; nothing where there are none."""
        waited = {name: seconds / steps for name, seconds in self._waited.items() if steps}
        found = {f"seconds_{name}": seconds for name, seconds in (waited | self._measured).items()}
        self.forget()
        return found

    def forget(self) -> None:
        """Begins anew."""
        self._measured, self._waited, self.measures = {}, {}, False


class Monitor:
    """Observes a run, and writes into its folder from the first process.

    Attributes:
      folder: of the run, or the one on this machine for what is on its way there.
      times: what parts of a step take; the source's functions are timed by it too.
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
        """Takes what to observe.

        Args:
          folder: of the run.
          tensorboard: whether lines are written for TensorBoard too.
          profile: the first and the last step, counted from 1, that jax's profiler sees.
          validation: on held-out examples; None for none.
          hang_after: seconds without a step after which the watchdog ends the run; None for never.
          least_seconds: how long the devices take for a batch's update at their peak; None where that is not known.
          learning_rate: by the number of updates that were made before; None to leave it out of the metrics.
          counts: further metrics since the last line; every process calls it.
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
        """While the run goes on from step `start`; lines of later steps, which a kill left, are dropped."""
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
        """When the state was saved: a folder in a bucket gets what was written since."""
        if is_first_process():
            self._outbox.send()

    def begin(self, step: int, state: TrainState, *, is_logged: bool) -> None:
        """Before the step of this number, counted from 1."""
        if is_logged:
            jax.block_until_ready(state)
            self.times.measures = True
        if self._profile and step == self._profile[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder / PROFILE)
            self._is_profiled = True

    def end(self, step: int, state: TrainState, *, is_last: bool, is_due: bool = False) -> Mapping[str, float] | None:
        """After the step, when all that belongs to it is done but its checkpoint.

        Args:
          step: that was done.
          state: after it.
          is_last: whether the run ends with it.
          is_due: whether a checkpoint does.

        Returns:
          The metrics of the validation, where there was one.
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
        """MFU of the update of a batch whose line has its time; nothing where either is not known."""
        if self._least_seconds is None or _UPDATE not in line:
            return {}
        return {MFU: self._least_seconds(batch) / line[_UPDATE]}

    def write(self, step: int, line: Mapping[str, float]) -> None:
        """A line of metrics, with the further counts and the learning rate of the last update that was made."""
        line = {**line, **self._counts()}
        if self._learning_rate is not None:
            made = step - int(line.get("skipped", 0))
            line = {**line, "learning_rate": float(self._learning_rate(max(made - 1, 0)))}
        self._append(METRICS, step, line)

    def _append(self, name: str, step: int, line: Mapping[str, float]) -> None:
        if not is_first_process():
            return
        # What is not finite becomes null, which JSON can hold.
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
                self._alive = now  # All of this process stood still, as a laptop that slept.
            if now - self._alive > limit:
                line = f"no step was done for {limit:g} s after step {self._last}: see above where each thread waits"

                def show(line: str = line) -> None:
                    faulthandler.dump_traceback(all_threads=True)
                    print(f"\nerror: {line}", file=sys.stderr, flush=True)

                fail_together(line, show, status=1)
                show()
                os._exit(1)


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
