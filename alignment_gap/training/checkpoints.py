"""Checkpoints of a run: complete or absent, with the parameters readable on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from alignment_gap.errors import UserError
from alignment_gap.training.state import TrainState


class Checkpoints:
    """The checkpoints in a folder, one per step, written by Orbax; use as a context manager.

    A checkpoint appears under its name only when all of it is on disk, so one that a kill cut short is never restored.
    """

    def __init__(self, folder: Path) -> None:
        # Saves block: a study's checkpoints are small, and an error then names the step that failed.
        options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Writes the state under its step."""
        rest = {"step": state.step, "optimizer_state": state.optimizer_state}
        items = ocp.args.Composite(params=ocp.args.StandardSave(state.params), optimizer=ocp.args.StandardSave(rest))
        self._manager.save(int(jax.device_get(state.step)), args=items)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The whole state of a step, laid out as `abstract` says."""
        target = {"step": abstract.step, "optimizer_state": abstract.optimizer_state}
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params), optimizer=ocp.args.StandardRestore(target)
        )
        restored = self._restore(step, items)
        return TrainState(restored.optimizer["step"], restored.params, restored.optimizer["optimizer_state"])

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """The parameters of a step, or of the last one.

        Raises:
          UserError: where there is none, it is damaged, or it is of another model; the first tensor that differs is
            named with both shapes.
        """
        if step is None:
            if not self.steps():
                raise UserError(f"{self.folder} holds no complete checkpoint: train it first, or give another folder")
            step = self.steps()[-1]
        _check_shapes(self.folder / str(step) / "params", abstract_params)
        return self._restore(step, ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))).params

    def _restore(self, step: int, items: Any) -> Any:
        try:
            return self._manager.restore(step, args=items)
        except (ValueError, KeyError, FileNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.folder}/{step} cannot be restored ({reason}): it is damaged or of another model"
            ) from error


def _check_shapes(path: Path, params: Any) -> None:
    """Raises UserError naming the first parameter that the checkpoint has not, or has in another shape."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(name, simple=True, separator="."): tuple(leaf.shape) for name, leaf in leaves}

    try:
        found = shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(path.absolute())).tree)
    except (ValueError, KeyError, OSError):
        return  # Damaged: the restore says how.
    wanted = shapes(params)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{path} is of another model: {name} has the shape {found.get(name, 'none')}, the model has "
                f"{wanted.get(name, 'none')}: give the model that it was trained as"
            )
