"""Folders that survive a kill: files whole or absent, one process at a time, one set of settings."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignment_gap.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Writes JSON under a temporary name, then renames: readers see the old file or the new, never half of one."""
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, *, remedy: str) -> Any:
    """What `write_json` wrote; raises UserError with the remedy where it is JSON no longer."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; raises UserError where another one works in it, or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"cannot write in {folder} ({error.strerror}): give a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by another run: wait for it, or give another folder") from error
        yield


def claim(path: Path, settings: Mapping[str, Any], *, remedy: str, may_change: Collection[str] = ()) -> None:
    """Writes the settings that a folder is made with into it, as the file `path`.

    Args:
      path: of the file.
      settings: flat, as JSON values.
      remedy: what to do where the folder holds others.
      may_change: settings that do not alter what is there.

    Raises:
      UserError: where the folder holds something of other settings, naming what differs, or settings nobody can read.
    """
    settings = json.loads(json.dumps(settings))
    if path.exists():
        found = read_json(path, remedy=remedy)
        differences = [
            f"{key} was {found.get(key, 'absent')}, now {settings.get(key, 'absent')}"
            for key in sorted(found.keys() | settings.keys())
            if key not in may_change and found.get(key) != settings.get(key)
        ]
        if differences:
            shown = "; ".join(differences[:3]) + (f"; {len(differences) - 3} more" if len(differences) > 3 else "")
            raise UserError(f"{path.parent} was made with other settings ({shown}): {remedy}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)
