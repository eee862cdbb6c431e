"""Several processes that train as one: which rows of a batch each holds, and how they agree, write and fail."""

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
from jax._src import distributed  # The key-value store that jax's processes share has no public name.
from jax.experimental import multihost_utils

from alignment_gap.errors import UserError
from alignment_gap.interruption import TRY_AGAIN, is_left_to_a_loop
from alignment_gap.sharding.layout import batch_sharding, replicated
from alignment_gap.sharding.mesh import LogicalMesh

Result = TypeVar("Result")

# Bytes of an error line that the other processes receive.
_LINE = 2048
# The first process that fails writes the reason under this key. The others look for it this often, in seconds.
_FAILURE, _LOOK_EVERY = "alignment_gap/failure", 0.25
# jax's key for the notice that one of the processes has received SIGTERM.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"
# Each process writes a heartbeat under this key and its number. If a process is silent for this many seconds, the
# process before it reports this. jax itself would wait 100 s and end with a stack trace.
_ALIVE, _BEAT_EVERY, _SILENT = "alignment_gap/alive", 2.0, 30.0
# Taken when this process reports a failure, its own or another's. It reports no second one.
_failure_told = threading.Lock()
# Set when this process ends normally.
_leaving = threading.Event()


def host_rows(mesh: LogicalMesh, size: int) -> np.ndarray:
    """The rows of a batch of `size` that this process's devices hold, in order; a single process holds all rows."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def put_batch(rows: Any, mesh: LogicalMesh, size: int) -> Any:
    """Global arrays, split over data and fsdp, from the rows that each process holds.

    Args:
      rows: a tree of arrays; their first axis has the rows `host_rows(mesh, size)` of the batch.
      mesh: the device mesh.
      size: size of the whole batch; a multiple of `mesh.batch_parts`.
    """
    held, sharding = host_rows(mesh, size), batch_sharding(mesh)

    def put(local: np.ndarray) -> jax.Array:
        local = np.asarray(local)
        if len(local) != len(held):
            raise ValueError(f"put_batch: {len(local)} rows given, but this process holds {len(held)} of {size}")

        def part(index: Any) -> np.ndarray:
            return local[np.searchsorted(held, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *local.shape[1:]), sharding, part)

    # The guard around the training loop forbids implicit transfers; this one is intended.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, rows)


def put_replicated(tree: Any, mesh: LogicalMesh) -> Any:
    """Puts arrays and random keys, equal in all processes, whole on every device."""
    sharding = replicated(mesh)

    def put(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def own_rows(tree: Any) -> Any:
    """The rows of batch-sharded arrays that this process holds, as numpy arrays; undoes `put_batch`."""

    def fetch(array: jax.Array) -> np.ndarray:
        first = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
        return np.concatenate(jax.device_get([first[row] for row in sorted(first)]))

    return jax.tree.map(fetch, tree)


def to_host(tree: Any) -> Any:
    """Whole arrays as numpy arrays in every process, from any sharding."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def initialize(coordinator: str | None, processes: int, process: int) -> None:
    """Connects this process to the other processes of a run; does nothing without a coordinator.

    Args:
      coordinator: HOST:PORT of process 0; "auto" finds it on TPU pods and Slurm; None for a single process.
      processes: number of processes; unused for "auto".
      process: number of this process, from 0; unused for "auto".

    Raises:
      UserError: the arguments do not fit together, or "auto" finds no cluster.
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
    """Ends every process of a run after this one failed; returns if there is only one process.

    Args:
      line: the error line that the other processes print.
      show: prints this process's own message.
      status: exit status of all processes: 2 if the user must fix something, 1 if another attempt may succeed.
    """
    client = distributed.global_state.client
    if client is None or distributed.global_state.num_processes == 1:
        return
    if not _failure_told.acquire(blocking=False):
        threading.Event().wait()  # Another process failed first; this failure is most likely its consequence.
    show()
    # The store raises if another process was first, or if the process that holds the store has ended.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        # A failure that this process only passes on already names its process.
        named = line if line.startswith("process ") else f"process {jax.process_index()}: {line}"
        client.key_value_set(_FAILURE, f"{status} {named}")
    _end(status)


def _watch_the_others() -> None:
    """Starts the threads that watch for failures, and stops them before Python ends.

    If Python ended while a thread uses the key-value store, the process would abort.
    """
    watching = [
        threading.Thread(target=target, name=f"alignment_gap {target.__name__}", daemon=True)
        for target in (_end_when_another_fails, _end_when_asked, _tell_when_the_next_is_silent)
    ]

    def leave() -> None:
        _leaving.set()
        for thread in watching:
            thread.join(timeout=_BEAT_EVERY)  # Do not wait for a thread that is ending the process itself.

    for thread in watching:
        thread.start()
    atexit.register(leave)


def _end_when_another_fails() -> None:
    client = distributed.global_state.client
    while client is not None and not _leaving.wait(_LOOK_EVERY):
        try:
            status, line = client.key_value_try_get(_FAILURE).split(" ", 1)
        except Exception:  # No process has failed, or the process that holds the store has ended.
            continue
        if not _failure_told.acquire(blocking=False):
            return
        # The newline ends a line that a progress bar left open. Another process may have reported this one's failure.
        line = line.removeprefix(f"process {jax.process_index()}: ")
        print(f"\nerror: {line}", file=sys.stderr, flush=True)
        _end(int(status))


def _end_when_asked() -> None:
    """Ends all processes after SIGTERM to one of them, unless a loop of training is to save first."""
    state = distributed.global_state
    client = state.client
    while client is not None and state.num_processes > 1 and not _leaving.wait(_LOOK_EVERY):
        if is_left_to_a_loop():
            continue
        try:
            client.key_value_try_get(_NOTICE)
        except Exception:  # No notice, or the process that holds the store has ended.
            continue
        line = "interrupted: the same command continues from here"
        fail_together(line, functools.partial(print, f"\n{line}", file=sys.stderr, flush=True), status=TRY_AGAIN)


def _tell_when_the_next_is_silent() -> None:
    """Sends this process's heartbeat; ends all processes if the next process in the ring is silent for too long."""
    state = distributed.global_state
    client, following = state.client, (state.process_id + 1) % state.num_processes
    heard, last, beats = time.monotonic(), None, 0
    while client is not None and following != state.process_id and not _leaving.wait(_BEAT_EVERY):
        beats += 1
        try:
            client.key_value_set(f"{_ALIVE}/{state.process_id}", str(beats), allow_overwrite=True)
            found = client.key_value_try_get(f"{_ALIVE}/{following}")
        except Exception:  # The next process has not started yet, or process 0 has died, which jax itself reports.
            continue
        if found != last:
            heard, last = time.monotonic(), found
        elif time.monotonic() - heard > _SILENT:
            line = f"process {following} has died or hangs: nothing was heard of it for {_SILENT:.0f} s"
            show = functools.partial(print, f"\nerror: {line}", file=sys.stderr, flush=True)
            fail_together(line, show, status=1)


def _end(status: int) -> None:
    """Ends this process; process 0 ends last, because jax aborts the others when process 0 is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep((8 if is_first_process() else 2) * _LOOK_EVERY)
    os._exit(status)


def is_first_process() -> bool:
    """Whether this is process 0, which writes the files that all processes share."""
    return jax.process_index() == 0


def on_first_process(function: Callable[[], object]) -> None:
    """Calls the function in the first process while the others wait; if it raises, all processes raise."""
    on_every_process(lambda: function() if is_first_process() else None)


def first_says(function: Callable[[], np.ndarray | int | bool]) -> np.ndarray:
    """The function's result in the first process, for every process; if it raises anywhere, all processes raise.

    Every process calls the function; the result must have the same shape in all.
    """
    value = np.asarray(on_every_process(function))
    return value if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(value)


def on_every_process(function: Callable[[], Result]) -> Result:
    """Calls the function in every process and returns this process's result; if it raises in one, all raise.

    Use it for work whose outcome may differ between processes, such as reading files. Otherwise one process could fail
    and end while the others wait for it.

    Raises:
      UserError: the function raised in another process; the message names the first such process and its error. If it
        raised in this process, this process raises its own error.
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
    """The first line that is not empty among the lines of all processes; the same in every process."""
    if jax.process_count() == 1:
        return line
    own = np.zeros(_LINE, np.uint8)
    encoded = np.frombuffer(line.encode()[:_LINE], np.uint8)
    own[: len(encoded)] = encoded
    lines = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(own)]
    return next(filter(None, lines), "")
