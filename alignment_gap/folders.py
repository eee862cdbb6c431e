"""Folders that survive a kill: files are whole or absent; one process at a time; one set of settings.

A folder is on this machine or in a bucket; `at` decides which. All files of runs, datasets and studies are opened with
the result of `at` and with the functions below, and in no other way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from alignment_gap.errors import InUse, UserError
from alignment_gap.interruption import check_not_requested
from alignment_gap.storage import SCHEMES, Url, fetched, is_leased, leased, working_folder

# Seconds that a lock may be held by a process that only looks, and seconds between two tries.
_BRIEFLY, _LOOK_EVERY = 2.0, 0.1

AnyPath = Path | Url
"""A file or folder on this machine or in a bucket."""


def at(place: str | os.PathLike[str]) -> AnyPath:
    """The file or folder at a place: a path on this machine, s3://BUCKET/NAME or gs://BUCKET/NAME."""
    if isinstance(place, Url):
        return place
    if "\0" in str(place):
        raise UserError(f"{str(place)!r} cannot be a path, because it has a null character: remove it")
    scheme, separator, rest = str(place).partition("://")
    if not (separator and re.fullmatch("[a-z][a-z0-9+.-]*", scheme)):
        return Path(place)
    if scheme not in SCHEMES or not rest.strip("/"):
        raise UserError(f"{place} cannot hold files: give a folder, s3://BUCKET/FOLDER or gs://BUCKET/FOLDER")
    return Url(place)


def here(place: str | os.PathLike[str], what: str) -> Path:
    """The file or folder at a place on this machine; raises UserError for a URL, because `what` must be local."""
    path = at(place)
    if isinstance(path, Url):
        raise UserError(f"{place}: {what} is read and written on this machine alone: copy it here, or give a folder")
    return path


def whole_path(path: AnyPath) -> str:
    """The path from the root, for a file that is read from any working folder; the URL of an object."""
    return str(path.absolute() if isinstance(path, Path) else path)


def copy_here(path: AnyPath, sha256: str) -> Path:
    """The file itself, or a local copy of the object with this digest."""
    return fetched(path, sha256) if isinstance(path, Url) else path


def write_json(path: AnyPath, content: Any) -> None:
    """Writes JSON under a temporary name, then renames it: readers see the old file or the new one, never a part."""
    write_bytes(path, _json(content))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_json(path: AnyPath, *, remedy: str) -> Any:
    """Reads what `write_json` wrote; raises UserError with the remedy if it is not valid JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from None


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it; objects in a bucket need no rename."""
    if isinstance(path, Url):
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync(path.parent)


def write_last(path: AnyPath, content: Any) -> None:
    """As `write_json`, for the file that completes a folder; raises UserError if another run already wrote it."""
    if not isinstance(path, Url):
        write_json(path, content)
    elif path.replace_content(_json(content), None) is None:
        raise UserError(f"{path.parent} was completed by another run meanwhile: nothing is left to do there")


def discard_last(path: AnyPath) -> None:
    """Removes the object that `write_last` wrote, so that the folder can be completed again."""
    if isinstance(path, Url):
        path.unlink(missing_ok=True)


def remove_folder(path: AnyPath) -> None:
    """Removes a folder and its contents, if it exists."""
    if isinstance(path, Url):
        path.remove_all()
    else:
        shutil.rmtree(path, ignore_errors=True)


def copy_files(source: AnyPath, target: AnyPath) -> None:
    """Copies the files of a folder, without its subfolders."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file():
            write_bytes(target / file.name, file.read_bytes())


class Outbox:
    """A local folder for files that are appended to or memory-mapped; `send` copies them to their place.

    Attributes:
      folder: the folder for the files; the place itself if it is on this machine.
    """

    def __init__(self, place: AnyPath, key: str = "") -> None:
        """The local folder of a place; different keys get different folders, so that they do not share files."""
        self._place = place
        self.folder = working_folder(place, key) if isinstance(place, Url) else place
        self._sent: dict[Path, tuple[int, int]] = {}

    def fetch(self, *names: str) -> None:
        """Replaces these local files by the place's versions."""
        for name in names if isinstance(self._place, Url) else ():
            (self.folder / name).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self._place / name).read_bytes())

    def send(self, last: Sequence[str] = ()) -> None:
        """Copies changed files to the place; the files in `last` come last, in this order, as they need the others."""
        if not isinstance(self._place, Url):
            return

        def turn(path: Path) -> tuple[int, Path]:
            return (last.index(path.name) + 1 if path.name in last else 0, path)

        for path in sorted((path for path in self.folder.rglob("*") if path.is_file()), key=turn):
            state = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._sent.get(path) != state:
                (self._place / path.relative_to(self.folder)).write_bytes(path.read_bytes())
                self._sent[path] = state

    def empty(self) -> None:
        """Removes the local folder; call it when the place has all files."""
        if isinstance(self._place, Url):
            remove_folder(self.folder)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: AnyPath, wait: float = _BRIEFLY) -> Iterator[None]:
    """Locks the folder for this process.

    Args:
      folder: the folder.
      wait: seconds to wait for another process that works in it. `is_held` holds the lock for a moment.

    Raises:
      InUse: another process works in the folder.
      UserError: it is not writable, or its file system has no locks.
    """
    if isinstance(folder, Url):
        with _flocked(working_folder(folder, "lock"), str(folder), wait), leased(folder, wait):
            yield
    else:
        with _flocked(folder, str(folder), wait):
            yield


@contextlib.contextmanager
def _flocked(folder: Path, name: str, wait: float) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"cannot write in {folder} ({error.strerror}): give a folder that can be written") from None
    with file:
        deadline = time.monotonic() + wait
        while not _is_free(file, fcntl.LOCK_EX, folder):
            if time.monotonic() > deadline:
                raise InUse(f"{name} is in use by another run: wait for it, or give another folder")
            check_not_requested()
            time.sleep(_LOOK_EVERY)
        yield


def _is_free(file: IO[str], kind: int, folder: Path) -> bool:
    """Whether no other process held the file's lock; this process then has it. Raises UserError if it has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{folder} cannot be locked ({error.strerror}): give a folder on a file system with locks"
        ) from error
    return True


def is_held(folder: AnyPath) -> bool:
    """Whether a process works in the folder, by its lock file, or by its lease in a bucket.

    The lock file shows processes of this machine, and of others if the file system shares locks.
    """
    if isinstance(folder, Url):
        return is_leased(folder)
    try:
        with (folder / ".lock").open("r") as file:
            return not _is_free(file, fcntl.LOCK_SH, folder)
    except FileNotFoundError:
        return False


# The files with the settings of a job and of a study. A folder holds one of them at most.
JOB, STUDY = "job.json", "study.json"


def check_kind(path: AnyPath) -> None:
    """Raises UserError if the folder of this file belongs to a study in place of a job, or the other way round."""
    for other in {JOB, STUDY} - {path.name}:
        if (path.parent / other).exists():
            raise UserError(f"{path.parent} holds a {other.removesuffix('.json')} already: give another folder")


def check_settings(
    path: AnyPath,
    settings: Mapping[str, Any],
    *,
    remedy: str,
    may_change: Collection[str] = (),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuses a folder that was made with other settings, according to the file `path`, if it exists.

    Args:
      path: path of the file.
      settings: the settings, flat, as JSON values.
      remedy: what the user can do if the folder has other settings.
      may_change: settings that may differ, because they do not alter the contents.
      defaults: default values for settings that the file of an earlier version does not have.

    Raises:
      UserError: the folder has other settings (the message names the differences), it holds a study or job in place
        of a job or study, or the file is not readable.
    """
    check_kind(path)
    if path.exists():
        settings = json.loads(json.dumps(settings))
        found = json.loads(json.dumps(dict(defaults))) | read_json(path, remedy=remedy)
        differences = [
            f"{key} was {found.get(key, 'absent')}, now {settings.get(key, 'absent')}"
            for key in sorted(found.keys() | settings.keys())
            if key not in may_change and found.get(key) != settings.get(key)
        ]
        if differences:
            shown = "; ".join(differences[:3]) + (f"; {len(differences) - 3} more" if len(differences) > 3 else "")
            raise UserError(
                f"{path.parent} was made with other settings ({shown}): {remedy}", page="jobs.md#stopping-and-resuming"
            )
