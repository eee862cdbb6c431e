"""Several processes that train as one: which rows of a batch each holds, and what only the first one does."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # The key-value store that jax's own processes meet in has no public name.
from jax.experimental import multihost_utils

from alignment_gap.errors import UserError
from alignment_gap.sharding.layout import batch_sharding, replicated
from alignment_gap.sharding.mesh import LogicalMesh

Result = TypeVar("Result")

# Bytes of an error's line that the other processes get to know.
_LINE = 2048
# Under this key the first process that fails says why. The others look for it this often, in seconds.
_FAILURE, _LOOK_EVERY = "alignment_gap/failure", 0.25
# Under this key and its number each process says that it lives. Of one that has said nothing for so many seconds the
# process before it says so; jax itself would wait 100 s and end with a stack trace.
_ALIVE, _BEAT_EVERY, _SILENT = "alignment_gap/alive", 2.0, 30.0
# Held once this process has a failure to tell, its own or another's; it tells no second one.
_failure_told = threading.Lock()
# Set when this process ends well.
_leaving = threading.Event()


def host_rows(mesh: LogicalMesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` that this process's devices hold, increasing; all of them in a single process."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def put_batch(rows: Any, mesh: LogicalMesh, size: int) -> Any:
    """Global arrays, split over data and fsdp, from the rows that each process holds.

    Args:
      rows: a tree of arrays with the rows `host_rows(mesh, size)` of the batch on their first axis.
      mesh: the device mesh.
      size: of the whole batch; a multiple of `mesh.batch_parts`.
    """
    held, sharding = host_rows(mesh, size), batch_sharding(mesh)

    def put(local: np.ndarray) -> jax.Array:
        local = np.asarray(local)
        if len(local) != len(held):
            raise ValueError(f"put_batch: {len(local)} rows given, but this process holds {len(held)} of {size}")

        def part(index: Any) -> np.ndarray:
            return local[np.searchsorted(held, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, part)

    # This is what the guard around the training loop wants: a transfer that is asked for.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, rows)


def put_replicated(tree: Any, mesh: LogicalMesh) -> Any:
    """Arrays and random keys that every process has alike, whole on all devices."""
    sharding = replicated(mesh)

    def put(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def own_rows(tree: Any) -> Any:
    """The rows that this process holds of arrays laid out as batches are, as numpy arrays: undoes `put_batch`."""

    def fetch(array: jax.Array) -> np.ndarray:
        first = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate(jax.device_get([first[row] for row in sorted(first)]))

    return jax.tree.map(fetch, tree)


def to_host(tree: Any) -> Any:
    """Whole arrays as numpy arrays in every process, wherever their parts lie."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def initialize(coordinator: str | None, processes: int, process: int) -> None:
    """Joins this process to the others of a run; does nothing where no coordinator is given.

    Args:
      coordinator: HOST:PORT of process 0; "auto" finds it, as on TPU pods and Slurm; None for a single process.
      processes: how many there are; unused for "auto".
      process: number of this one, from 0; unused for "auto".

    Raises:
      UserError: where the three do not fit, or "auto" finds no cluster.
    """
    if not coordinator:
        if processes != 1 or process:
            raise UserError(f"{processes} processes without a coordinator: give the HOST:PORT of process 0, or auto")
        return
    if coordinator != "auto" and not 0 <= process < processes:
        raise UserError(f"process {process} of {processes}: processes are numbered from 0 to {processes - 1}")
    if coordinator != "auto" and not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"coordinator {coordinator} has no port: give the HOST:PORT of process 0, or auto")
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"coordinator {coordinator}: {str(error).strip().splitlines()[0]}: give its HOST:PORT, the number of "
            "processes and the number of this one"
        ) from error
    _watch_the_others()


def fail_together(line: str, show: Callable[[], None] = lambda: None, status: int = 2) -> None:
    """Ends every process of a run after this one failed; returns where there is one process only.

    Args:
      line: what the others print.
      show: prints what this one has to say.
      status: exit status of all: 2 for what the user has to mend, 1 for what another attempt may not meet.
    """
    client = distributed.global_state.client
    if client is None or distributed.global_state.num_processes == 1:
        return
    if not _failure_told.acquire(blocking=False):
        threading.Event().wait()  # Another process has failed before; what this one met is most often the consequence.
    show()
    # It raises where another was first, or where the store has gone with its process.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        # What this process only passes on names another already.
        named = line if line.startswith("process ") else f"process {jax.process_index()}: {line}"
        client.key_value_set(_FAILURE, f"{status} {named}")
    _end(status)


def _watch_the_others() -> None:
    """Starts the threads that watch for failures, and ends them before Python does.

    A thread that is inside of the key-value store when Python ends would abort the process.
    """
    watching = [
        threading.Thread(target=target, name=f"alignment_gap {target.__name__}", daemon=True)
        for target in (_end_when_another_fails, _tell_when_the_next_is_silent)
    ]

    def leave() -> None:
        _leaving.set()
        for thread in watching:
            thread.join(timeout=_BEAT_EVERY)  # One that ends the process waits for no one.

    for thread in watching:
        thread.start()
    atexit.register(leave)


def _end_when_another_fails() -> None:
    client = distributed.global_state.client
    while client is not None and not _leaving.wait(_LOOK_EVERY):
        try:
            status, line = client.key_value_try_get(_FAILURE).split(" ", 1)
        except Exception:  # Nobody has failed, or the store has gone with its process.
            continue
        if not _failure_told.acquire(blocking=False):
            return
        # A progress bar may have left its line open. Another may have been faster to pass on why this process fails.
        line = line.removeprefix(f"process {jax.process_index()}: ")
        print(f"\nerror: {line}", file=sys.stderr, flush=True)
        _end(int(status))


def _tell_when_the_next_is_silent() -> None:
    """Says that this process lives, and fails for all where the next one, in a ring of them, says so no longer."""
    state = distributed.global_state
    client, following = state.client, (state.process_id + 1) % state.num_processes
    heard, last, beats = time.monotonic(), None, 0
    while client is not None and following != state.process_id and not _leaving.wait(_BEAT_EVERY):
        beats += 1
        try:
            client.key_value_set(f"{_ALIVE}/{state.process_id}", str(beats), allow_overwrite=True)
            found = client.key_value_try_get(f"{_ALIVE}/{following}")
        except Exception:  # The next process has not begun yet, or process 0 has died, which jax itself reports.
            continue
        if found != last:
            heard, last = time.monotonic(), found
        elif time.monotonic() - heard > _SILENT:
            line = f"process {following} has died or hangs: nothing was heard of it for {_SILENT:.0f} s"
            show = functools.partial(print, f"\nerror: {line}", file=sys.stderr, flush=True)
            fail_together(line, show, status=1)


def _end(status: int) -> None:
    """Ends this process; the first one last, for jax aborts the others where it finds it gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep((8 if is_first_process() else 2) * _LOOK_EVERY)
    os._exit(status)


def is_first_process() -> bool:
    """Whether this process is the one that writes what all have in common."""
    return jax.process_index() == 0


def on_first_process(function: Callable[[], object]) -> None:
    """Calls the function in the first process while the others wait; where it raises, all raise."""
    on_every_process(lambda: function() if is_first_process() else None)


def first_says(function: Callable[[], np.ndarray | int | bool]) -> np.ndarray:
    """What the function gives in the first process, in every process; where it raises, all raise.

    Every process calls the function, whose result has the same shape in all.
    """
    value = np.asarray(on_every_process(function))
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


def on_every_process(function: Callable[[], Result]) -> Result:
    """What the function gives in this process, once it has returned in all of them; where it raises in one, all raise.

    For what a process does alone and may find another state of, such as reading files: without this one process would
    end and the others wait for it.

    Raises:
      UserError: the line of the first process where it raised, which is named; what it raised in this one, if it did.
    """
    try:
        result = function()
    except Exception as error:
        first_reason(f"process {jax.process_index()}: {str(error) or type(error).__name__}".splitlines()[0])
        raise
    if line := first_reason(""):
        raise UserError(line)
    return result


def first_reason(line: str) -> str:
    """Of the lines that all processes give, the first that is not empty; in every process."""
    if jax.process_count() == 1:
        return line
    own = np.zeros(_LINE, np.uint8)
    encoded = np.frombuffer(line.encode()[:_LINE], np.uint8)
    own[: len(encoded)] = encoded
    lines = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(own)]
    return next(filter(None, lines), "")
