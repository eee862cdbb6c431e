"""Checkpoints of a run in a bucket, written by jax's serialisation: Orbax cannot write to s3://, and renames folders.

CHECKPOINTS/STEP/
  params/NAME/, optimizer/NAME/   one array each; no two processes share a chunk, and every process writes its own
  _CHECKPOINT_METADATA            written last, if no other run wrote it; it makes the checkpoint complete
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental.array_serialization.serialization import GlobalAsyncCheckpointManager

from alignment_gap.checkpoints import complete_steps
from alignment_gap.checkpoints.layout import LARGEST_CHUNK, METADATA, zarr_spec
from alignment_gap.errors import UserError
from alignment_gap.sharding import on_every_process, on_first_process
from alignment_gap.storage import Url, explained, is_of_the_store

# Seconds that processes wait for the slowest one to write its parts.
_PATIENCE = 3600


class _Saved(NamedTuple):
    """The facts about a checkpoint that Orbax's policies read."""

    step: int
    metrics: dict[str, float] | None


class BucketManager:
    """The methods of Orbax's `CheckpointManager` that `Checkpoints` calls, for a folder in a bucket.

    Args:
      folder: folder of the checkpoints.
      preserved: Orbax's policy that decides which checkpoints stay.
    """

    def __init__(self, folder: Url, preserved: Any) -> None:
        self._folder, self._preserved = folder, preserved
        self._metrics: dict[int, dict[str, float] | None] = {}
        self._writer = GlobalAsyncCheckpointManager(_PATIENCE)
        self._has_failed = False
        self.reload()

    def reload(self) -> None:
        """Reads again which checkpoints are complete."""
        self._steps = complete_steps(self._folder)

    def all_steps(self) -> list[int]:
        """Steps with a complete checkpoint."""
        return self._steps

    def save(
        self, step: int, args: ocp.args.Composite, metrics: dict[str, float], custom_metadata: Mapping[str, Any]
    ) -> None:
        """Begins to write a checkpoint; returns when the arrays are copied to the host."""
        place = self._folder / str(step)
        on_first_process(place.remove_all)  # Leftovers of a killed run would become a part of the checkpoint.
        named = {name: leaf for item, save in args.items() for name, leaf in _leaves(place / item, save.item)}
        # On a CPU, the next step would reuse the memory while it is being written.
        arrays = [jnp.copy(leaf) if jax.default_backend() == "cpu" else leaf for leaf in named.values()]
        specs = [zarr_spec(name.parent, name.name) | _stored(leaf) for name, leaf in named.items()]
        self._metrics[step] = metrics or None
        there = [_Saved(each, self._metrics_of(each)) for each in (*self._steps, step)]
        stays = self._preserved.should_preserve(there, context=ocp.checkpoint_managers.PreservationContext())
        self._steps = [saved.step for saved, each in zip(there, stays, strict=True) if each]
        superseded = [saved.step for saved, each in zip(there, stays, strict=True) if not each]
        content = {"custom_metadata": dict(custom_metadata), "metrics": metrics}
        commit = functools.partial(self._commit, place, content, superseded)
        self._calling(lambda: self._writer.serialize(arrays, specs, on_commit_callback=commit))

    def wait_until_finished(self) -> None:
        """Waits until the saved checkpoint is complete; raises StorageError if the store refuses it.

        After a failure it does not wait, because the other processes will not come.
        """
        if not self._has_failed:
            self._has_failed = True
            self._calling(self._writer.wait_until_finished)
            self._has_failed = False

    def restore(self, step: int, args: ocp.args.Composite) -> ocp.args.Composite:
        """The parts of a checkpoint, sharded like the abstract arrays."""
        return on_every_process(lambda: self._calling(lambda: self._read(self._folder / str(step), args)))

    def delete(self, step: int) -> None:
        """Removes a checkpoint."""
        on_first_process(lambda: self._remove(step))
        self._steps = [each for each in self._steps if each != step]

    def close(self) -> None:
        """Does nothing: no thread is left."""

    def _metrics_of(self, step: int) -> dict[str, float] | None:
        """The metrics that decide which checkpoints are best; None if there was no validation."""
        if step not in self._metrics:
            self._metrics[step] = json.loads((self._folder / str(step) / METADATA).read_text()).get("metrics") or None
        return self._metrics[step]

    def _commit(self, place: Url, content: Mapping[str, Any], superseded: Sequence[int]) -> None:
        if (place / METADATA).replace_content(json.dumps(content).encode(), None) is None:
            raise UserError(f"{place} was meanwhile written by another run: give one of the two runs another folder")
        for step in superseded:
            self._remove(step)

    def _remove(self, step: int) -> None:
        place = self._folder / str(step)
        (place / METADATA).unlink(missing_ok=True)  # First: without the metadata, the rest is no checkpoint.
        place.remove_all()

    def _read(self, place: Url, args: ocp.args.Composite) -> ocp.args.Composite:
        wanted = {name: restore.item for name, restore in args.items()}
        named = {name: leaf for item, tree in wanted.items() for name, leaf in _leaves(place / item, tree)}
        specs = [zarr_spec(name.parent, name.name) for name in named]
        arrays = self._writer.deserialize([leaf.sharding for leaf in named.values()], specs)
        for (name, leaf), array in zip(named.items(), arrays, strict=True):
            if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
                raise ValueError(f"{name.name} is {array.dtype}{array.shape}, not {leaf.dtype}{leaf.shape}")
        parts = iter(arrays)
        return ocp.args.Composite(
            **{name: jax.tree.map(lambda leaf: next(parts), tree) for name, tree in wanted.items()}
        )

    def _calling(self, function: Any) -> Any:
        """Calls the function; turns errors of the store into one line."""
        try:
            return function()
        except (ValueError, OSError, RuntimeError) as error:
            if is_of_the_store(error):
                raise explained(self._folder, error) from error
            raise


def _leaves(place: Url, tree: Any) -> Iterator[tuple[Url, Any]]:
    """The arrays of a tree with their places in the bucket, under the names that Orbax gives them."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield place / jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _stored(array: jax.Array) -> dict[str, Any]:
    """How an array is stored: a chunk is a device's part, or a fraction of it if the part is large."""
    chunk = list(array.sharding.shard_shape(array.shape))
    while math.prod(chunk) * array.dtype.itemsize > LARGEST_CHUNK:
        longest = chunk.index(max(chunk))
        chunk[longest] //= next(part for part in range(2, chunk[longest] + 1) if chunk[longest] % part == 0)
    metadata = {"compressor": {"id": "zstd", "level": 1}, "shape": [*array.shape], "chunks": chunk}
    return {"metadata": metadata, "store_data_equal_to_fill_value": True}
