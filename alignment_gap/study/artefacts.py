"""Artefacts: folders named by the hash of what they were made from, complete or absent."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment_gap.folders import sync, write_json

# Changes where the code changes what a stage makes from the same settings, so that old artefacts are not taken for new.
FORMAT = 2

# Told how many units of work are newly done.
Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a study: makes a folder from settings and from the folders of other stages.

    Attributes:
      name: unique in its study; the readable part of the folder's name.
      settings: everything but the inputs that its result depends on, as JSON values.
      inputs: the stages whose folders it reads.
      run: `(folder, progress) -> None` fills the folder; called again after a kill it goes on with what it finds there.
      units: what it reports to `progress` in all.
    """

    name: str
    settings: dict[str, Any]
    inputs: tuple[Stage, ...]
    run: Callable[[Path, Progress], None]
    units: int

    @property
    def key(self) -> str:
        """Hash of the settings, the inputs' keys and the format of artefacts."""
        content = {"format": FORMAT, "settings": self.settings, "inputs": [stage.key for stage in self.inputs]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, root: Path) -> Path:
        """Where the finished artefact is."""
        return root / f"{self.name}-{self.key}"


def make(stage: Stage, root: Path, progress: Progress) -> Path:
    """The stage's folder, made now unless it is there: filled under a temporary name and renamed when complete."""
    folder = stage.folder(root)
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    start = time.time()
    stage.run(partial, progress)
    seconds = time.time() - start
    card = {"name": stage.name, "settings": stage.settings, "inputs": [s.folder(root).name for s in stage.inputs]}
    write_json(partial / "artefact.json", card | {"seconds": round(seconds, 1)})
    os.rename(partial, folder)
    sync(root)
    return folder
