"""Datasets on disk: a folder of ArrayRecord files and an index card, written whole or not at all.

    prepared/
      card.json                  counts, lengths, vocabulary digest, provenance, a digest of each file
      pairs.array_record         one example per record: tokens without padding, in msgpack

`write_dataset` writes a dataset at once. Alternatively, `write_chunk` writes it chunk by chunk, and `close_dataset`
finishes it; a chunk replaces an earlier chunk with the same name. A folder without a card is unfinished. Until there is
a card, `.chunks/` keeps a summary of each chunk, so that closing the dataset need not read the chunks.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex, overload

import msgpack
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from alignment_gap import checks
from alignment_gap.data.records.example import TOKEN_FIELDS, Example, check_form, decode, encode
from alignment_gap.data.records.summary import summarise_lengths
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at, remove_folder, sync, write_bytes
from alignment_gap.storage import Url, fetched

FORMAT_VERSION = 2
CARD, CHUNKS = "card.json", ".chunks"
_SUFFIX = ".array_record"
# Measured with 350-byte records: random reads are four times as fast as with groups of 1, and as fast as with 64.
_WRITER_OPTIONS = "group_size:8"
# Examples in a part, which is made as a whole; and the maximum number of parts: many systems limit a process to 1024
# open files.
_PART, _FILES = 5000, 400
PROBABILITIES, REWARDS = "probabilities", "rewards"

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The card's entry for one record file.

    It has the file's name, size and SHA-256; the number and longest lengths of its examples; and their `TOKEN_FIELDS`.
    """

    name: str
    count: int
    bytes: int
    sha256: str
    responses_per_prompt: int
    max_prompt_length: int
    max_response_length: int
    reference_log_probs: bool
    sampler_log_probs: bool = False

    @property
    def token_fields(self) -> tuple[str, ...]:
        """The `TOKEN_FIELDS` that its examples have."""
        return tuple(name for name in TOKEN_FIELDS if getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Card:
    """The index card of a dataset.

    Attributes:
      format_version: version of the format of folder and records.
      count: number of examples in all files.
      responses_per_prompt: K, the same in every example.
      max_prompt_length: tokens of the longest prompt.
      max_response_length: tokens of the longest response.
      lengths: summaries for "prompt" and "response", in tokens; see `summary.summarise_lengths`.
      fields: names of the fields of an example.
      vocabulary_digest: `digest` of the vocabulary that the dataset was encoded with.
      provenance: how the dataset was made, as stated by its maker.
      files: the record files, in the order of their examples.
      scores: kind of the scores: "probabilities" (the probability that this response of a pair is preferred, from 0 to
        1), or "rewards" (any numbers; higher is better).
    """

    format_version: int
    count: int
    responses_per_prompt: int
    max_prompt_length: int
    max_response_length: int
    lengths: Mapping[str, Any]
    fields: tuple[str, ...]
    vocabulary_digest: str
    provenance: Mapping[str, Any]
    files: tuple[Chunk, ...]
    scores: str = PROBABILITIES

    def __post_init__(self) -> None:
        checks.one_of(self, (PROBABILITIES, REWARDS), "scores")

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the record files, the vocabulary's digest and the kind of scores."""
        content: list[Any] = [self.vocabulary_digest, [chunk.sha256 for chunk in self.files]]
        if self.scores != PROBABILITIES:  # Datasets of earlier versions keep their digest.
            content.append(self.scores)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Dataset(Sequence[Example]):
    """A dataset on disk, with random access.

    Attributes:
      folder: its folder.
      card: its index card.
    """

    def __init__(self, folder: AnyPath, card: Card):
        """Use `open_dataset`, which checks the folder."""
        self.folder = folder
        self.card = card
        self._files = [_copy_here(folder / chunk.name, chunk.sha256) for chunk in card.files]
        self._readers = [_open_records(file) for file in self._files]
        self._ends = list(itertools.accumulate(chunk.count for chunk in card.files))

    def __len__(self) -> int:
        return self.card.count

    @overload
    def __getitem__(self, index: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Example | list[Example]:
        """The example or examples at `index`; raises UserError that names the file if it is damaged."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        file = bisect.bisect_right(self._ends, position)
        row = position - (self._ends[file - 1] if file else 0)
        try:
            return decode(self._readers[file].read([row])[0])
        except _DAMAGE as error:
            raise _damaged(self.folder / self.card.files[file].name, row, error) from None

    def records(self, numbers: Sequence[int]) -> list[bytes]:
        """The examples as on disk, read together; raises UserError that names the file if it is damaged."""
        found: list[bytes] = [b""] * len(numbers)
        places: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            places.setdefault(bisect.bisect_right(self._ends, number), []).append(place)
        for file, there in places.items():
            start = self._ends[file - 1] if file else 0
            try:
                read = self._readers[file].read([int(numbers[place]) - start for place in there])
            except _DAMAGE:
                for place in there:
                    self[int(numbers[place])]  # Names the record.
                raise
            for place, record in zip(there, read, strict=True):
                found[place] = record
        return found


def write_dataset(
    folder: _Path,
    examples: Iterable[Example],
    *,
    vocabulary_digest: str,
    provenance: Mapping[str, Any],
    scores: str = Card.scores,
    name: str = "pairs",
) -> Card:
    """Writes `examples` as one record file with a card to `folder`; equal input gives equal bytes.

    Args:
      folder: folder of the dataset; created if it does not exist.
      examples: at least one, all of one form.
      vocabulary_digest, provenance, scores: as on the `Card`.
      name: name of the record file, without its suffix.

    Raises:
      UserError: there is no example, examples differ in form, or the disk is full or cannot be written.
    """
    write_chunk(folder, name, examples)
    path = at(folder)
    return _write_card(path, [_summary(chunk_path(path, name))], vocabulary_digest, provenance, scores)


def write_chunk(folder: _Path, name: str, examples: Iterable[Example]) -> Chunk:
    """Writes `examples` as the record file `name` in `folder`; replaces an earlier file with that name.

    The file has a temporary name until it is whole and on the disk, so a kill leaves the earlier file or none.

    Raises:
      UserError: there is no example, examples differ in form, or the disk is full or cannot be written.
    """
    path = chunk_path(folder, name)
    summary = _Summary(str(path))
    return _write_chunk(path, map(encode, summary.watch(examples)), summary)


class GrowingChunk:
    """Examples that are written as a chunk again and again, while their number grows; each is encoded only once."""

    def __init__(self, where: str):
        """`where` names the chunk in errors."""
        self._summary = _Summary(where)
        self._records: list[bytes] = []

    def extend(self, examples: Iterable[Example]) -> None:
        """Adds examples; raises UserError if they differ in form, or if the chunk stays empty."""
        self._records.extend(map(encode, self._summary.watch(examples)))

    def write(self, folder: _Path, name: str) -> Chunk:
        """Writes all examples as `write_chunk` does."""
        return _write_chunk(chunk_path(folder, name), self._records, self._summary)


def _write_chunk(path: AnyPath, records: Iterable[bytes], summary: _Summary) -> Chunk:
    with _made_in(path.parent) as made_in:
        partial = made_in / path.with_suffix(".partial").name
        try:
            _write_records(partial, path, records)
            chunk = summary.chunk(path.name, partial)
            with _writing(path):
                _keep_summary(path, chunk, summary)
                _put(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    return chunk


@contextlib.contextmanager
def _made_in(folder: AnyPath) -> Iterator[pathlib.Path]:
    """A local folder in which a file for `folder` is made: `folder` itself if it is local."""
    if isinstance(folder, Url):
        with tempfile.TemporaryDirectory() as made_in:
            yield pathlib.Path(made_in)
    else:
        yield folder


def _put(partial: pathlib.Path, path: AnyPath) -> None:
    if isinstance(path, Url):
        path.write_bytes(partial.read_bytes())
    else:
        os.replace(partial, path)
        sync(path.parent)


def part_size(count: int) -> int:
    """Examples per record file, for `count` examples in files of one size, so that all files can be open at once."""
    return max(_PART, -(-count // _FILES))


def chunk_path(folder: _Path, name: str) -> AnyPath:
    """The record file of a chunk; it exists only if the chunk is whole."""
    return at(folder) / f"{name}{_SUFFIX}"


def close_dataset(
    folder: _Path, *, vocabulary_digest: str, provenance: Mapping[str, Any], scores: str = Card.scores
) -> Card:
    """Writes the card of the chunks in `folder`, in the order of their names; this completes the dataset.

    Args:
      folder: folder with the chunks.
      vocabulary_digest, provenance, scores: as on the `Card`.

    Raises:
      UserError: there is no chunk, a chunk is damaged or of another form, or the disk is full or cannot be written.
    """
    folder = at(folder)
    paths: list[AnyPath] = [*folder.glob(f"*{_SUFFIX}")]
    summaries = [_summary(path) for path in sorted(paths)]
    if not summaries:
        raise UserError(f"no dataset can be closed in {folder}: it holds no *{_SUFFIX} file; write a chunk first")
    return _write_card(folder, summaries, vocabulary_digest, provenance, scores)


def derived(made_by: str, inputs: Mapping[str, Dataset], **facts: Any) -> dict[str, Any]:
    """Provenance of a dataset made from others; it includes theirs, so it is complete even if folders move.

    Args:
      made_by: name of the command that made the dataset.
      inputs: the input datasets by their roles.
      facts: everything else that decides the content, as JSON values.
    """
    chain = [
        {
            "role": role,
            "folder": str(dataset.folder),
            "digest": dataset.card.digest,
            "count": dataset.card.count,
            "provenance": dict(dataset.card.provenance),
        }
        for role, dataset in inputs.items()
    ]
    return {"made_by": made_by, **facts, "inputs": chain}


def open_dataset(folder: _Path) -> Dataset:
    """Opens the dataset in `folder`; checks its card, and the sizes and counts of its files.

    Raises:
      UserError: the folder is not a finished dataset, has another format, or was changed after its card was written.
    """
    folder = at(folder)
    dataset = Dataset(folder, _read_card(folder / CARD))
    for chunk, file, reader in zip(dataset.card.files, dataset._files, dataset._readers, strict=True):
        size, count = file.stat().st_size, reader.num_records()
        if (size, count) != (chunk.bytes, chunk.count):
            raise UserError(
                f"{folder / chunk.name} has {count} records in {size} bytes, but its card says {chunk.count} in "
                f"{chunk.bytes}: prepare the dataset again"
            )
    return dataset


def verify_dataset(dataset: Dataset) -> None:
    """Reads every file; raises UserError if one does not match the card, and names a damaged record."""
    for chunk, file in zip(dataset.card.files, dataset._files, strict=True):
        path = dataset.folder / chunk.name
        if _sha256(file) != chunk.sha256:
            collections.deque(_read_all(path), maxlen=0)
            raise UserError(f"{path} was changed after its card was written: prepare the dataset again")


def discard_damaged(folder: _Path) -> list[str]:
    """Removes record files that do not match the card of a finished dataset; returns the names of what was not whole.

    A card that cannot be read is removed too; its files are read again when the dataset is closed.
    """
    path = at(folder)
    try:
        files = _read_card(path / CARD).files
    except UserError:
        (path / CARD).unlink()
        return [CARD]
    damaged = [chunk.name for chunk in files if not is_intact(path / chunk.name, chunk.sha256)]
    for name in damaged:
        (path / name).unlink(missing_ok=True)
    return damaged


def read_chunk(folder: _Path, name: str) -> list[Example]:
    """The examples of a chunk; raises UserError if it is missing or damaged."""
    return [*_read_all(chunk_path(folder, name))]


def discard_chunks(folder: _Path, unwanted: Callable[[str], bool]) -> None:
    """Removes the chunks with unwanted names; also removes the card, because it lists all chunks."""
    path = at(folder)
    for chunk in [each for each in path.glob(f"*{_SUFFIX}") if unwanted(each.stem)]:
        (path / CARD).unlink(missing_ok=True)
        chunk.unlink()


def is_intact(path: AnyPath, sha256: str) -> bool:
    """Whether a file exists and still matches its digest."""
    return path.is_file() and _sha256(path) == sha256


class _Summary:
    """Collects counts and longest lengths of the examples that pass through, and checks that they have one form."""

    def __init__(self, where: str):
        self.where = where
        self.count = 0
        self.first: Example | None = None
        self.prompt_lengths: collections.Counter[int] = collections.Counter()
        self.response_lengths: collections.Counter[int] = collections.Counter()

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        for example in examples:
            self.first = self.first or example
            check_form(example, self.first, f"record {self.count} of {self.where}")
            self.count += 1
            self.prompt_lengths[len(example.prompt)] += 1
            self.response_lengths.update(map(len, example.responses))
            yield example
        if not self.count:
            raise UserError(f"{self.where} would hold no example: check which records were dropped")

    def chunk(self, name: str, path: pathlib.Path) -> Chunk:
        assert self.first
        return Chunk(
            name=name,
            count=self.count,
            bytes=path.stat().st_size,
            sha256=_sha256(path),
            responses_per_prompt=len(self.first.responses),
            max_prompt_length=max(self.prompt_lengths),
            max_response_length=max(self.response_lengths),
            **{field: getattr(self.first, field) is not None for field in TOKEN_FIELDS},
        )


class _Known(NamedTuple):
    """A chunk, and for each length the number of prompts and of responses that have it."""

    chunk: Chunk
    prompt_lengths: Mapping[int, int]
    response_lengths: Mapping[int, int]


def _keep_summary(path: AnyPath, chunk: Chunk, summary: _Summary) -> None:
    """Writes a chunk's summary before the chunk gets its name; a summary without a matching file does no harm."""
    lengths = [sorted(counts.items()) for counts in (summary.prompt_lengths, summary.response_lengths)]
    kept = path.parent / CHUNKS / f"{path.stem}.json"
    kept.parent.mkdir(exist_ok=True)
    write_bytes(kept, json.dumps([dataclasses.asdict(chunk), *lengths]).encode())


def _summary(path: AnyPath) -> _Known:
    """The kept summary of a chunk; reads the file if it has no summary or has changed."""
    kept = path.parent / CHUNKS / f"{path.stem}.json"
    if kept.exists():
        chunk, prompts, responses = json.loads(kept.read_text())
        if chunk["sha256"] == _sha256(path):
            return _Known(Chunk(**chunk), dict(prompts), dict(responses))
    summary = _Summary(str(path))
    collections.deque(summary.watch(_read_all(path)), maxlen=0)
    return _Known(summary.chunk(path.name, _copy_here(path)), summary.prompt_lengths, summary.response_lengths)


def _write_records(partial: pathlib.Path, path: AnyPath, records: Iterable[bytes]) -> None:
    """Writes the file `partial`, which later becomes `path`; errors raised by `records` pass through unchanged."""
    with _writing(path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    try:
        for record in records:
            with _writing(path):
                writer.write(record)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            writer.close()
        raise
    with _writing(path):
        writer.close()
        sync(partial)


def _read_all(path: AnyPath) -> Iterator[Example]:
    reader = _open_records(_copy_here(path))
    for row in range(reader.num_records()):
        try:
            example = decode(reader.read([row])[0])
        except _DAMAGE as error:
            raise _damaged(path, row, error) from None
        yield example


def _copy_here(path: AnyPath, sha256: str | None = None) -> pathlib.Path:
    """A record file, or the local copy of one in a bucket; its digest is computed if it is not given."""
    if not isinstance(path, Url):
        return path
    try:
        return fetched(path, sha256 or _sha256(path))
    except FileNotFoundError:
        raise _missing(path) from None


def _open_records(path: pathlib.Path) -> ArrayRecordReader:
    if not path.is_file():
        raise _missing(path)
    try:
        reader = ArrayRecordReader(str(path))
        if reader.num_records():
            return reader
        # A damaged file has a count of 0; reading a record gives the reason.
        reader.read_all()
        reason = "it holds no records"
    except RuntimeError as error:
        reason = _first_clause(error)
        if os.strerror(errno.EMFILE) in reason:
            raise UserError(
                f"cannot open {path} ({reason}): raise the limit, for example with ulimit -n 65536"
            ) from None
    raise UserError(f"{path} is not a whole record file ({reason}): prepare the dataset again")


_DAMAGE = (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException)


def _missing(path: AnyPath) -> UserError:
    return UserError(f"{path} is missing, though the card names it: prepare the dataset again")


def _damaged(path: AnyPath, row: int, error: Exception) -> UserError:
    return UserError(f"record {row} of {path} cannot be read ({_first_clause(error)}): prepare the dataset again")


@contextlib.contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    """Turns the errors of a full or unwritable disk into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _unwritable(path, error.strerror or str(error), full) from None
    except RuntimeError as error:  # ArrayRecord's writer does not raise OSError.
        raise _unwritable(path, _first_clause(error), os.strerror(errno.ENOSPC) in str(error)) from None


def _unwritable(path: AnyPath, reason: str, full: bool) -> UserError:
    remedy = "free space on its disk and run again" if full else "give a folder that can be written"
    return UserError(f"cannot write {path} ({reason}): {remedy}; what was finished before is intact")


def _first_clause(error: Exception) -> str:
    return str(error).split(";")[0].strip() or type(error).__name__


def _write_card(
    folder: AnyPath, known: Sequence[_Known], vocabulary_digest: str, provenance: Mapping[str, Any], scores: str
) -> Card:
    chunks = [part.chunk for part in known]
    _check_chunks(folder, chunks)
    names = [field.name for field in dataclasses.fields(Example)]
    card = Card(
        format_version=FORMAT_VERSION,
        **_totals(chunks),
        lengths={
            "prompt": _add_up(part.prompt_lengths for part in known),
            "response": _add_up(part.response_lengths for part in known),
        },
        fields=tuple(name for name in names if name not in TOKEN_FIELDS or name in chunks[0].token_fields),
        vocabulary_digest=vocabulary_digest,
        provenance=json.loads(json.dumps(dict(provenance))),  # As it will be read back: tuples become lists.
        files=tuple(chunks),
        scores=scores,
    )
    with _writing(folder / CARD):
        write_bytes(folder / CARD, (json.dumps(dataclasses.asdict(card), indent=2) + "\n").encode())
        remove_folder(folder / CHUNKS)
    return card


def _check_chunks(folder: AnyPath, chunks: Sequence[Chunk]) -> None:
    """Raises UserError unless the examples of all chunks have one form."""
    first = chunks[0]
    for chunk in chunks:
        if chunk.responses_per_prompt != first.responses_per_prompt:
            raise UserError(
                f"{folder / chunk.name} has {chunk.responses_per_prompt} responses a prompt, but {first.name} has "
                f"{first.responses_per_prompt}: keep them in two datasets"
            )
        for name in TOKEN_FIELDS:
            if getattr(chunk, name) != getattr(first, name):
                raise UserError(
                    f"only one of {folder / chunk.name} and {first.name} has {name}: give them for all or for none"
                )


def _add_up(counts: Iterable[Mapping[int, int]]) -> dict[str, Any]:
    return summarise_lengths(sum(map(collections.Counter, counts), collections.Counter()))


def _read_card(path: AnyPath) -> Card:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"it has format {version}, but this version reads {FORMAT_VERSION}: prepare it again")
        content["files"] = tuple(Chunk(**chunk) for chunk in content["files"])
        content["fields"] = tuple(content["fields"])
        card = Card(**content)
        if not (isinstance(card.provenance, dict) and isinstance(card.lengths, dict)):
            raise TypeError("its provenance and lengths must be tables")
        if card != dataclasses.replace(card, **_totals(card.files)):
            raise ValueError("its counts and lengths do not match its files")
        return card
    except OSError as error:
        train = path.parent / "train"
        given = f"{train}" if (train / CARD).exists() else "a prepared dataset's folder"
        raise UserError(
            f"{path.parent} is not a finished dataset ({CARD}: {error.strerror}): give {given}, or run the job that "
            "writes it again"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not a dataset's card ({error!r}): prepare the dataset again") from None


def _totals(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """The totals over all files of a card."""
    return {
        "count": sum(chunk.count for chunk in chunks),
        "responses_per_prompt": chunks[0].responses_per_prompt,
        "max_prompt_length": max(chunk.max_prompt_length for chunk in chunks),
        "max_response_length": max(chunk.max_response_length for chunk in chunks),
    }


def _sha256(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
