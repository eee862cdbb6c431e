"""Several processes that train as one: which rows of a batch each holds, and what only the first one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignment_gap.errors import UserError
from alignment_gap.sharding.layout import batch_sharding
from alignment_gap.sharding.mesh import LogicalMesh

Result = TypeVar("Result")

# Bytes of an error's line that the other processes get to know.
_LINE = 2048


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


def initialize(coordinator: str, processes: int, process: int) -> None:
    """Joins this process to the others of a run; does nothing where no coordinator is given.

    Args:
      coordinator: HOST:PORT of process 0; "auto" finds it, as on TPU pods, Slurm and Open MPI; "" for a single process.
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


def is_first_process() -> bool:
    """Whether this process is the one that writes what all have in common."""
    return jax.process_index() == 0


def on_first_process(function: Callable[[], None]) -> None:
    """Calls the function in the first process while the others wait; where it raises, all raise."""
    on_every_process(lambda: function() if is_first_process() else None)


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
        _first_line(f"process {jax.process_index()}: {str(error) or type(error).__name__}".splitlines()[0])
        raise
    if line := _first_line(""):
        raise UserError(line)
    return result


def _first_line(line: str) -> str:
    """Of the lines that all processes give, the first that is not empty."""
    if jax.process_count() == 1:
        return line
    own = np.zeros(_LINE, np.uint8)
    encoded = np.frombuffer(line.encode()[:_LINE], np.uint8)
    own[: len(encoded)] = encoded
    lines = [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in multihost_utils.process_allgather(own)]
    return next(filter(None, lines), "")
