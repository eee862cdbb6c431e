"""Buckets as folders: s3:// and gs://, read and written by tensorstore.

An object store has no rename and no lock files. An object appears whole or not at all. A group of objects is complete
when its manifest is there, which is written last. Preconditions keep two writers apart: a write can require that the
object is unchanged since it was read, or still absent.
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

from alignment_gap.errors import InUse, StorageError, UserError

SCHEMES = ("s3", "gs")
# Tensorstore waits longer before each retry: 4 minutes in total.
RETRIES = {"max_retries": 12, "initial_delay": "500ms", "max_delay": "32s"}
# After this many seconds without a byte, a request is tried again; libcurl itself would wait forever.
_STALLED = 60
# Seconds between two renewals of a lease, and seconds without a renewal after which another run takes it over.
RENEW_EVERY, STALE_AFTER = 10.0, 60.0
_LOOK_EVERY = 1.0
# The longest part of the store's own message that an error line quotes.
_LONGEST = 160
# A part of the store's message, our message for it, and the exit status; engines try again after status 1.
_REASONS = (
    ("retry attempts failed", "the store does not answer: run the same command again; it continues from here", 1),
    ("NoSuchBucket", "the bucket does not exist: create it, or give another place", 2),
    ("bucket does not exist", "the bucket does not exist: create it, or give another place", 2),
    ("Invalid S3 bucket name", "the name of the bucket is not valid: write s3://BUCKET/FOLDER", 2),
    ("Failed to get credentials", "no credentials were found: set AWS_ACCESS_KEY_ID and the like, or a profile", 2),
    ("UNAUTHENTICATED", "no credentials were found: run gcloud auth application-default login, or use a role", 2),
    ("PERMISSION_DENIED", "access is denied: set other credentials, or grant these access to the bucket", 2),
)


class Url(PurePosixPath):
    """An object in a bucket, or all objects under a name, with the methods of `pathlib.Path` that this library uses.

    Methods raise StorageError if the store refuses or does not answer.
    """

    __slots__ = ()

    def __str__(self) -> str:
        """The URL with "://"; a path's parts keep only one slash."""
        return super().__str__().replace(":/", "://", 1)

    @property
    def key(self) -> str:
        """The name in the bucket."""
        return "/".join(self.parts[2:])

    def exists(self) -> bool:
        """Whether there is an object with this name, or objects under it."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Whether there is an object with this name."""
        return self.key in self._keys(self.key, f"{self.key}\0")

    def is_dir(self) -> bool:
        """Whether there are objects under this name."""
        return bool(self._keys(*self._range))

    def files(self) -> list[Url]:
        """All objects under this name, in order."""
        return [Url(*self.parts[:2], key) for key in self._keys(*self._range)]

    def iterdir(self) -> Iterator[Url]:
        """The files and folders directly in this folder, in order."""
        depth = len(self.parts)
        yield from sorted({Url(*file.parts[: depth + 1]) for file in self.files()})

    def glob(self, pattern: str) -> Iterator[Url]:
        """The files and folders below this one that match, in order; each part of the pattern matches one name."""
        depth, wanted = len(self.parts), PurePosixPath(pattern).parts
        for found in sorted({Url(*file.parts[: depth + len(wanted)]) for file in self.files()}):
            names = found.parts[depth:]
            if len(names) == len(wanted) and all(map(fnmatch.fnmatchcase, names, wanted)):
                yield found

    def read_bytes(self) -> bytes:
        """The content of the object; raises FileNotFoundError if it does not exist."""
        return self.read()[0]

    def read_text(self, encoding: str = "utf-8") -> str:
        """The content of the object as text, with line ends translated as in a text file."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding).read()

    def open(self, mode: str = "rb") -> io.BytesIO:
        """The content of the object as a file."""
        assert mode == "rb"
        return io.BytesIO(self.read_bytes())

    def read(self) -> tuple[bytes, bytes]:
        """The content of the object, and its generation; raises FileNotFoundError if it does not exist."""
        found = self._done(self._bucket.read(self.key))
        if found.state != "value":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return found.value, found.stamp.generation

    def write_bytes(self, content: bytes) -> None:
        """Writes the object; replaces an earlier one."""
        self._done(self._bucket.write(self.key, content))

    def replace_content(self, content: bytes, generation: bytes | None) -> bytes | None:
        """Writes the object if it still has this generation or, for None, if it is still absent.

        Returns:
          The new generation; None if another writer changed or removed the object.
        """
        if generation is None:
            found = self._done(self._bucket.read(self.key))
            if found.state == "value":
                return found.stamp.generation if found.value == content else None
            generation = found.stamp.generation  # The generation of an absent object.
        written = self._done(self._bucket.write(self.key, content, if_equal=generation))
        if written.generation:
            return bytes(written.generation)
        # If the answer to a write was lost, its retry finds the content that the write itself wrote.
        with contextlib.suppress(FileNotFoundError):
            now, generation = self.read()
            return generation if now == content else None
        return None

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object."""
        if not missing_ok and not self.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        self._done(self._bucket.write(self.key, None))

    def unlink_if(self, generation: bytes) -> None:
        """Removes the object if it still has this generation."""
        self._done(self._bucket.write(self.key, None, if_equal=generation))

    def remove_all(self) -> None:
        """Removes all objects under this name."""
        self._done(self._bucket.delete_range(_key_range(*self._range)))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Does nothing: a folder exists as soon as it has an object."""

    def spec(self) -> dict[str, Any]:
        """The tensorstore spec of the objects under this name."""
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
        """The range of names under this one: its start, and its end (exclusive); "0" comes after "/"."""
        return (f"{self.key}/", f"{self.key}0") if self.key else ("", "")

    def _keys(self, first: str, end: str) -> list[str]:
        """The names in the bucket from `first` to `end` (exclusive), in order."""
        found = self._done(self._bucket.list(_key_range(first, end)))
        return sorted(key.decode() for key in found)

    def _done(self, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise explained(self, error) from None


def explained(place: Url, error: Exception) -> StorageError:
    """Turns a tensorstore error at a place into a one-line StorageError."""
    text = str(error).strip()
    # The rest of the message holds the request's headers.
    said = text.splitlines()[0].partition(" [")[0][:_LONGEST]
    for sign, remedy, status in _REASONS:
        if sign in text:
            return StorageError(f"{place}: {remedy} ({said})", status)
    return StorageError(f"{place} cannot be used ({said}): check that the bucket and the network still work", 1)


def is_of_the_store(error: Exception) -> bool:
    """Whether a tensorstore error comes from the store or the connection to it, not from the stored data."""
    return any(sign in str(error) for sign, _, _ in _REASONS)


def _s3_settings() -> dict[str, Any]:
    """Settings that AWS's own tools read from the environment, but tensorstore does not."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    # The default search for credentials logs every file that it does not find.
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
    """The local folder for copies of objects, and for files that are not yet in a bucket."""
    given = os.environ.get("ALIGNMENT_GAP_CACHE")
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "alignment_gap"
    return (Path(given) if given else usual).expanduser()


def working_folder(place: Url, key: str = "") -> Path:
    """The local folder in which files for a place are made; different keys give different folders."""
    digest = hashlib.sha256(f"{place}\n{key}".encode()).hexdigest()[:16]
    folder = cache_folder() / "working" / f"{place.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetched(place: Url, sha256: str) -> Path:
    """A copy of an object in this machine's cache; raises UserError if its content does not match the digest."""
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
    """A name for this machine's cache; processes that share the cache are kept apart by its lock files."""
    path = cache_folder() / "machine"
    while not path.exists() or not path.read_text():
        path.unlink(missing_ok=True)  # Empty, if a process of an earlier version was killed.
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"machine.{uuid.uuid4().hex}.partial")
        partial.write_text(uuid.uuid4().hex)
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)  # The first of several processes gives the name.
        partial.unlink()
    return path.read_text()


@contextlib.contextmanager
def leased(folder: Url, wait: float = 0.0) -> Iterator[None]:
    """Holds a folder for this process by a lease: an object that this process keeps renewing.

    The caller already holds the lock file on this machine, so an existing lease of this machine is left from a dead
    process. A lease of another machine is watched. If it is renewed, its owner is alive; if not for `STALE_AFTER`
    seconds, this process takes it over. A process that finds its own lease taken over ends at once.

    Args:
      folder: the folder.
      wait: seconds to wait for a living owner.

    Raises:
      InUse: another machine works in the folder.
    """
    lease = folder / ".lock"
    owner = {"owner": uuid.uuid4().hex, "machine": _machine(), "host": socket.gethostname(), "process": os.getpid()}
    held = [_taken(lease, owner, wait)]
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, owner, held, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        with contextlib.suppress(StorageError):  # A lease that stays becomes stale.
            lease.unlink_if(held[-1])  # If another process has taken it over, it stays.


def _lease_content(owner: Mapping[str, Any]) -> bytes:
    return json.dumps({**owner, "renewed": time.time()}).encode()


def read_lease(lease: Url) -> tuple[dict[str, Any], bytes | None]:
    """The holder of a lease, and its generation; an empty dict and None if there is no lease."""
    try:
        content, generation = lease.read()
    except FileNotFoundError:
        return {}, None
    with contextlib.suppress(ValueError):
        return dict(json.loads(content)), generation
    return {}, generation


def is_leased(folder: Url) -> bool:
    """Whether a run works in a folder; compares the clocks of both machines."""
    return time.time() - read_lease(folder / ".lock")[0].get("renewed", 0) < STALE_AFTER


def _taken(lease: Url, owner: Mapping[str, Any], wait: float) -> bytes:
    """Writes the lease if there is none or it has expired; returns its generation."""
    holder, seen = read_lease(lease)
    begun = since = time.monotonic()
    while True:
        is_over = seen is None or holder.get("machine") == owner["machine"] or time.monotonic() - since > STALE_AFTER
        if is_over and (held := lease.replace_content(_lease_content(owner), seen)):
            return held
        if not is_over:
            time.sleep(_LOOK_EVERY)
        holder, now = read_lease(lease)
        if now is not None and now != seen:
            since = time.monotonic()
            if since - begun > wait:
                where = f"{holder.get('host')}, process {holder.get('process')}"
                raise InUse(f"{lease.parent} is in use by another run ({where}): wait for it, or give another folder")
        seen = now


def _renew(lease: Url, owner: Mapping[str, Any], held: list[bytes], ended: threading.Event) -> None:
    """Renews a lease until `ended`; its last generation is the only item of `held`."""
    while not ended.wait(RENEW_EVERY):
        try:
            renewed = lease.replace_content(_lease_content(owner), held[-1])
        except StorageError:
            continue  # The next try finds out if there is another owner.
        if renewed is None:
            line = f"{lease.parent} was taken over by another run, because this one was silent for {STALE_AFTER:g} s"
            print(f"\nerror: {line}: this one ends", file=sys.stderr, flush=True)
            os._exit(1)
        else:
            held[:] = [renewed]
