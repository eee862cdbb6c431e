"""Artefacts: folders named by the hash of what they were made from, complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignment_gap.errors import UserError

# Changes where the code changes what a stage makes from the same settings, so that old artefacts are not taken for new.
FORMAT = 1

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


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames: readers see the old file or the new, never half of one."""
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)


def sync(folder: Path) -> None:
    """Makes renames in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; raises UserError where another one works in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by another run: wait for it, or give another --workdir") from error
        yield


def claim(folder: Path, config: dict[str, Any], *, update: bool) -> None:
    """Writes the study's config into its folder.

    Raises:
      UserError: where the folder holds the study of another config, naming what differs, unless `update` is set.
    """
    path = folder / "study.json"
    config = json.loads(json.dumps(config))
    if path.exists() and not update:
        found = json.loads(path.read_text())
        differences = [
            f"{key} was {found.get(key, 'absent')}, now {config.get(key, 'absent')}"
            for key in sorted(found.keys() | config.keys())
            if found.get(key) != config.get(key)
        ]
        if differences:
            shown = "; ".join(differences[:3]) + (f"; {len(differences) - 3} more" if len(differences) > 3 else "")
            raise UserError(
                f"{folder} holds a study of another config ({shown}): give another --workdir, or --update to replace "
                "its report and redo only the stages that depend on what changed"
            )
    write_json(path, config)
