"""Buckets as folders: s3:// and gs://, read and written by tensorstore.

An object store has no rename and no lock files. An object appears whole or not at all. Objects that are complete only
together are so once their manifest is there, which is written last. Preconditions keep two writers apart: a write can
ask that the object is still the one that was read, or still absent.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import io
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from alignment_gap.errors import StorageError, UserError

SCHEMES = ("s3", "gs")
# Tensorstore waits longer before each try: 4 minutes in all.
RETRIES = {"max_retries": 12, "initial_delay": "500ms", "max_delay": "32s"}
# Seconds without a byte after which a request is tried again; libcurl itself would wait for ever.
_STALLED = 60
# Seconds between two renewals of a lease, and after which a lease that nobody renews is taken over.
RENEW_EVERY, STALE_AFTER = 10.0, 60.0
_LOOK_EVERY = 1.0
# Characters of the store's own message that a line has room for.
_LONGEST = 160
# What the store's message has, what the line says, and the exit status: engines try again what ends with 1.
_REASONS = (
    ("retry attempts failed", "the store does not answer: run the same command again, which goes on from here", 1),
    ("NoSuchBucket", "the bucket does not exist: create it, or give another place", 2),
    ("bucket does not exist", "the bucket does not exist: create it, or give another place", 2),
    ("Invalid S3 bucket name", "the name of the bucket is not valid: write s3://BUCKET/FOLDER", 2),
    ("Failed to get credentials", "no credentials were found: set AWS_ACCESS_KEY_ID and the like, or a profile", 2),
    ("UNAUTHENTICATED", "no credentials were found: run gcloud auth application-default login, or use a role", 2),
    ("PERMISSION_DENIED", "access is denied: set other credentials, or grant these access to the bucket", 2),
)


class Url(PurePosixPath):
    """An object of a bucket, or all objects under a name, with those methods of `pathlib.Path` that are used here.

    Methods raise StorageError where the store refuses or does not answer.
    """

    __slots__ = ()

    def __str__(self) -> str:
        """The URL with both slashes, which the parts of a path do not keep."""
        return super().__str__().replace(":/", "://", 1)

    @property
    def key(self) -> str:
        """Its name in the bucket."""
        return "/".join(self.parts[2:])

    def exists(self) -> bool:
        """Whether there is such an object, or one under this name."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self.key in self._keys(self.key, f"{self.key}\0")

    def is_dir(self) -> bool:
        """Whether there are objects under this name."""
        return bool(self._keys(*self._range))

    def files(self) -> list[Url]:
        """All objects under this name, in order."""
        return [Url(*self.parts[:2], key) for key in self._keys(*self._range)]

    def iterdir(self) -> Iterator[Url]:
        """What a listing of this folder has, in order."""
        depth = len(self.parts)
        yield from sorted({Url(*file.parts[: depth + 1]) for file in self.files()})

    def glob(self, pattern: str) -> Iterator[Url]:
        """The files and folders whose names below this one match, in order; each part of the pattern is one name."""
        depth, wanted = len(self.parts), PurePosixPath(pattern).parts
        for found in sorted({Url(*file.parts[: depth + len(wanted)]) for file in self.files()}):
            names = found.parts[depth:]
            if len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted)):
                yield found

    def read_bytes(self) -> bytes:
        """The content of the object; raises FileNotFoundError where there is none."""
        return self.read()[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of the object as text, with the ends of lines that a file's text has."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding).read()

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The content of the object as a file."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    def read(self) -> tuple[bytes, bytes]:
        """The content of the object, and its generation; raises FileNotFoundError where there is none."""
        found = self._done(self._bucket.read(self.key))
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found.value, found.stamp.generation

    def write_bytes(self, content: bytes) -> None:
        """Writes the object, in place of an earlier one."""
        self._done(self._bucket.write(self.key, content))

    def replace_content(self, content: bytes, generation: bytes | None) -> bytes | None:
        """Writes the object if it is still of this generation, or still absent where that is None.

        Returns:
          The new generation; None where somebody else has written or removed the object.
        """
        if generation is None:
            found = self._done(self._bucket.read(self.key))
            if found.state == "value":
                return found.stamp.generation if found.value == content else None
            generation = found.stamp.generation  # The one of what is absent.
        written = self._done(self._bucket.write(self.key, content, if_equal=generation))
        if written.generation:
            return bytes(written.generation)
        # A write whose answer was lost is tried again, and meets what it wrote itself.
        with contextlib.suppress(FileNotFoundError):
            now, generation = self.read()
            return generation if now == content else None
        return None

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        self._done(self._bucket.write(self.key, None))

    def remove_all(self) -> None:
        """Removes all objects under this name."""
        self._done(self._bucket.delete_range(_key_range(*self._range)))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there with its first object."""

    def spec(self) -> dict[str, Any]:
        """Tensorstore's description of the objects under this name."""
        scheme, bucket, key = self.parts[0][:-1], self.parts[1], self.key
        spec = {"driver": "gcs", "gcs_request_retries": RETRIES}
        if scheme == "s3":
            spec = {"driver": "s3", "s3_request_retries": RETRIES} | _s3_settings()
        return spec | {"bucket": bucket, "path": f"{key}/" if key else ""}

    @property
    def _bucket(self) -> Any:
        top = Url(*self.parts[:2])
        try:
            return _open_bucket(json.dumps(top.spec()))
        except ValueError as error:
            raise explained(top, error) from None

    @property
    def _range(self) -> tuple[str, str]:
        """The first name under this one, and the first after all of them; "0" follows "/"."""
        return (f"{self.key}/", f"{self.key}0") if self.key else ("", "")

    def _keys(self, first: str, end: str) -> list[str]:
        """The names in the bucket from `first` on and before `end`, in order."""
        found = self._done(self._bucket.list(_key_range(first, end)))
        return sorted(key.decode() for key in found)

    def _done(self, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise explained(self, error) from None


def explained(place: Url, error: Exception) -> StorageError:
    """The line of what tensorstore met at a place."""
    text = str(error).strip()
    # The request's headers follow.
    said = text.splitlines()[0].partition(" [")[0][:_LONGEST]
    for sign, remedy, status in _REASONS:
        if sign in text:
            return StorageError(f"{place}: {remedy} ({said})", status)
    return StorageError(f"{place} cannot be used ({said}): see whether the bucket and the network are as they were", 1)


def is_of_the_store(error: Exception) -> bool:
    """Whether an error of tensorstore is of the store or the way to it, and not of what is stored."""
    return any(sign in str(error) for sign, _, _ in _REASONS)


def _s3_settings() -> dict[str, Any]:
    """What AWS's own tools read from the environment, and tensorstore does not."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # The usual search for credentials logs every file that it does not find.
    credentials = {"type": "environment" if "AWS_ACCESS_KEY_ID" in os.environ else "default"}
    given = {"endpoint": endpoint, "aws_region": region}
    return {name: value for name, value in given.items() if value} | {"aws_credentials": credentials}


@functools.lru_cache
def _open_bucket(spec: str) -> Any:
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(_STALLED))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    import tensorstore

    return tensorstore.KvStore.open(json.loads(spec)).result()


def _key_range(first: str, end: str) -> Any:
    import tensorstore

    return tensorstore.KvStore.KeyRange(first, end)


# On this machine.


def cache_folder() -> Path:
    """The folder of this machine for copies of what is in buckets, and for what is on its way there."""
    given = os.environ.get("ALIGNMENT_GAP_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alignment_gap"
    return (Path(given) if given else usual).expanduser()


def working_folder(place: Url, key: str = "") -> Path:
    """The folder of this machine where what belongs at a place is made; `key` tells apart what differs there."""
    digest = hashlib.sha256(f"{place}\n{key}".encode()).hexdigest()[:16]
    folder = cache_folder() / "working" / f"{place.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(place: Url, sha256: str) -> Path:
    """A copy of an object in this machine's cache; raises UserError where its content is another than it was."""
    path = cache_folder() / "files" / sha256
    if path.is_file() and _sha256(path.read_bytes()) == sha256:
        return path
    content = place.read_bytes()
    if _sha256(content) != sha256:
        raise UserError(f"{place} was changed since its digest was written: make it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{sha256}.{uuid.uuid4().hex}.partial")  # Several processes may fetch it at once.
    partial.write_bytes(content)
    os.replace(partial, path)
    return path


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# Ownership.


def _machine() -> str:
    """Names this machine's cache, whose lock files keep the processes that share it apart."""
    path = cache_folder() / "machine"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write(uuid.uuid4().hex)
    return path.read_text()


@contextlib.contextmanager
def leased(folder: Url) -> Iterator[None]:
    """Holds a folder for this process by a lease, an object that is renewed; a lock file of this machine is held.

    A lease that this machine wrote is of a process that has died. One of another machine is watched: where it is
    renewed its owner lives, and where it is not for `STALE_AFTER` seconds it is taken over. A process that finds its
    own lease taken over ends at once.

    Raises:
      UserError: another machine works in the folder.
    """
    lease = folder / ".lock"
    owner = {"owner": uuid.uuid4().hex, "machine": _machine(), "host": socket.gethostname(), "process": os.getpid()}
    held = _taken(lease, owner)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, owner, held, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(StorageError):  # It becomes stale.
            lease.unlink(missing_ok=True)


def _lease_content(owner: Mapping[str, Any]) -> bytes:
    return json.dumps({**owner, "renewed": time.time()}).encode()


def read_lease(lease: Url) -> tuple[dict[str, Any], bytes | None]:
    """Who holds a lease, and its generation; nothing and None where nobody does."""
    try:
        content, generation = lease.read()
    except FileNotFoundError:
        return {}, None
    with contextlib.suppress(ValueError):
        return dict(json.loads(content)), generation
    return {}, generation


def is_leased(folder: Url) -> bool:
    """Whether somebody works in a folder, by the clocks of both."""
    return time.time() - read_lease(folder / ".lock")[0].get("renewed", 0) < STALE_AFTER


def _taken(lease: Url, owner: Mapping[str, Any]) -> bytes:
    """Writes the lease in place of none or of one that is over; gives its generation."""
    holder, seen = read_lease(lease)
    since = time.monotonic()
    while True:
        is_over = seen is None or holder.get("machine") == owner["machine"] or time.monotonic() - since > STALE_AFTER
        if is_over and (held := lease.replace_content(_lease_content(owner), seen)):
            return held
        if not is_over:
            time.sleep(_LOOK_EVERY)
        holder, now = read_lease(lease)
        if now is not None and now != seen:
            where = f"{holder.get('host')}, process {holder.get('process')}"
            raise UserError(f"{lease.parent} is in use by another run ({where}): wait for it, or give another folder")
        seen = now


def _renew(lease: Url, owner: Mapping[str, Any], held: bytes, ended: threading.Event) -> None:
    while not ended.wait(RENEW_EVERY):
        try:
            renewed = lease.replace_content(_lease_content(owner), held)
        except StorageError:
            continue  # Another owner is found at the next try.
        if renewed is None:
            line = f"{lease.parent} was taken over by another run, for this one was silent for {STALE_AFTER:g} s"
            print(f"\nerror: {line}: this one ends", file=sys.stderr, flush=True)
            os._exit(1)
        held = renewed
