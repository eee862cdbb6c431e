"""Checkpoints of a run: complete or absent, saying what network they hold, the parameters readable on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from alignment_gap.checkpoints import Network, check_shapes, find_checkpoint, known_network
from alignment_gap.checkpoints.layout import NETWORK, PARAMS, first_line
from alignment_gap.checkpoints.network import to_json
from alignment_gap.checkpoints.tensors import shapes_of
from alignment_gap.errors import UserError
from alignment_gap.models import Policy, PreferenceModel
from alignment_gap.sharding import LogicalMesh
from alignment_gap.training.state import TrainState, abstract_params


class Checkpoints:
    """The checkpoints in a folder, one per step, written by Orbax; use as a context manager.

    A checkpoint appears under its name only when all of it is on disk, so one that a kill cut short is never restored.

    Args:
      folder: of the checkpoints; made by the first save.
      network: what they hold, which they then say; not needed to read them.
    """

    def __init__(self, folder: Path, network: Network | None = None) -> None:
        # Saves block: a study's checkpoints are small, and an error then names the step that failed.
        options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False)
        self.folder = folder
        self._metadata = {NETWORK: to_json(network)} if network else None
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
        self.folder.mkdir(parents=True, exist_ok=True)
        rest = {"step": state.step, "optimizer_state": state.optimizer_state}
        items = {"params": state.params, "optimizer": rest} | ({"copies": state.copies} if state.copies else {})
        saved = ocp.args.Composite(**{name: ocp.args.StandardSave(tree) for name, tree in items.items()})
        self._manager.save(int(jax.device_get(state.step)), args=saved, custom_metadata=self._metadata)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The whole state of a step, laid out as `abstract` says."""
        rest = {"step": abstract.step, "optimizer_state": abstract.optimizer_state}
        items = {"params": abstract.params, "optimizer": rest} | (
            {"copies": abstract.copies} if abstract.copies else {}
        )
        restored = self._restore(step, items)
        rest, copies = restored.optimizer, restored.copies if abstract.copies else {}
        return TrainState(rest["step"], restored.params, rest["optimizer_state"], copies)

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """The parameters of a step, or of the last one.

        Raises:
          UserError: where there is none, it is damaged, or it is of another model: the tensors that differ are named,
            with both shapes.
        """
        if step is None:
            if not self.steps():
                raise UserError(f"{self.folder} holds no complete checkpoint: train it first, or give another folder")
            step = self.steps()[-1]
        _check_shapes(self.folder / str(step) / PARAMS, abstract_params)
        return self._restore(step, {"params": abstract_params}).params

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        targets = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in items.items()})
        try:
            return self._manager.restore(step, args=targets)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise UserError(
                f"{self.folder}/{step} cannot be restored ({first_line(error)}): it is damaged or of another model"
            ) from error


def load_policy(path: str | Path, mesh: LogicalMesh, step: int | None = None) -> tuple[Policy, Any]:
    """The policy that a checkpoint holds and its parameters, laid out over the mesh.

    Args:
      path: a run's folder, its checkpoints/, or the folder of a step.
      mesh: the device mesh.
      step: which of a run's checkpoints; None for the last.

    Raises:
      UserError: where there is none, it is damaged, or it does not say what network it holds.
    """
    folder = find_checkpoint(Path(path), step)
    policy = known_network(folder).policy()
    return policy, _load(folder, policy, mesh)


def load_preference_model(path: str | Path, mesh: LogicalMesh, step: int | None = None) -> tuple[PreferenceModel, Any]:
    """The preference model that a checkpoint holds and its parameters; see `load_policy`."""
    folder = find_checkpoint(Path(path), step)
    model = known_network(folder).preference_model()
    return model, _load(folder, model.policy, mesh)


def _load(folder: Path, policy: Policy, mesh: LogicalMesh) -> Any:
    with Checkpoints(folder.parent) as checkpoints:
        return checkpoints.restore_params(abstract_params(policy.init, mesh), int(folder.name))


def _check_shapes(path: Path, params: Any) -> None:
    """Raises UserError naming the parameters that the checkpoint has not, or has in another shape."""
    try:
        found = shapes_of(ocp.StandardCheckpointHandler().metadata(epath.Path(path.absolute())).tree)
    except (ValueError, KeyError, OSError):
        return  # Damaged: the restore says how.
    check_shapes(str(path), found, shapes_of(params))
