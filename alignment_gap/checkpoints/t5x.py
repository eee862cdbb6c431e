"""T5X's current checkpoints: checkpoint_STEP/state/ is an Orbax tree with the target and the optimizer state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from alignment_gap.checkpoints.formats import Foreign
from alignment_gap.checkpoints.layout import METADATA, open_store, write_store
from alignment_gap.checkpoints.t5x_tree import TARGET, t5_entries, t5_foreign
from alignment_gap.checkpoints.tensors import Tensor, exported, from_array
from alignment_gap.models import ModelConfig

PREFIX, STATE = "checkpoint_", "state"
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"


def recognises(path: Path) -> bool:
    """Whether it is a T5X checkpoint folder with an Orbax tree, or a model's folder that contains such checkpoints."""
    return (last_step(path) / STATE).is_dir()


def open_foreign(path: Path) -> Foreign:
    """Reads the T5 network in the target; raises UserError if the target holds no T5."""
    return t5_foreign(path, open_store(last_step(path) / STATE))


def write(output: Path, model: ModelConfig, tensors: Mapping[str, Tensor], companions: Path | None = None) -> None:
    """Writes a model's folder with checkpoint_0, without optimizer state."""
    theirs = exported(tensors, t5_entries(model))
    folder = output / f"{PREFIX}0"
    tree = {TARGET + name: tensor for name, tensor in theirs.items()}
    write_store(folder / STATE, tree | {"state.step": from_array(np.asarray(0, np.int32))})
    metadata = {"item_handlers": {STATE: _HANDLER}, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
    (folder / METADATA).write_text(json.dumps(metadata))
    (folder / "commit_success.txt").write_text("Checkpoint commit was successful.\n")


def last_step(path: Path) -> Path:
    """The last checkpoint if the path is a model's folder, else the path itself."""
    steps = [int(p.name.removeprefix(PREFIX)) for p in path.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return path / f"{PREFIX}{max(steps)}" if steps else path
