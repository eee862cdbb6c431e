"""Datasets on disk: a folder of ArrayRecord files and an index card, written whole or not at all.

    prepared/
      card.json                  counts, lengths, vocabulary digest, provenance, a digest of each file
      pairs.array_record         one example a record: tokens without padding, msgpack

A dataset is written in one go by `write_dataset`, or chunk by chunk by `write_chunk` and finished by `close_dataset`;
a chunk that is written again replaces the earlier one of its name. A folder without a card is unfinished; until it has
one, `.chunks/` keeps what is known of each chunk, so that closing need not read them again.
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
# Measured with 350-byte records: a random read is four times as fast as with groups of 1, and as fast as with 64.
_WRITER_OPTIONS = "group_size:8"
# Of a part of a dataset, which is made or made again as one. Systems let a process have 1024 files open, often.
_PART, _FILES = 5000, 400
PROBABILITIES, REWARDS = "probabilities", "rewards"

_Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What the card says of one record file.

    Its name, size and SHA-256; its examples' count and longest lengths; and which of `TOKEN_FIELDS` they have.
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
        """Those of `TOKEN_FIELDS` that its examples have."""
        return tuple(name for name in TOKEN_FIELDS if getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Card:
    """The index card of a dataset.

    Attributes:
      format_version: of the folder and its records.
      count: examples in all files.
      responses_per_prompt: K, the same in every example.
      max_prompt_length: tokens of the longest prompt.
      max_response_length: tokens of the longest response.
      lengths: of "prompt" and of "response", in tokens; see `lengths.summarise_lengths`.
      fields: what an example holds.
      vocabulary_digest: `digest` of the vocabulary that it was encoded with.
      provenance: how it came about, as its maker states it.
      files: the record files, in the order of their examples.
      scores: what the scores are: "probabilities" (of a pair, how probable it is that this response is preferred: 1, 0,
        0.5 or between), or "rewards" (any numbers, higher is better).
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
        """SHA-256 in hexadecimal of the examples, in their files, of their vocabulary and of what their scores are."""
        content: list[Any] = [self.vocabulary_digest, [chunk.sha256 for chunk in self.files]]
        if self.scores != PROBABILITIES:  # Datasets that were written before there was a choice keep their digest.
            content.append(self.scores)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Dataset(Sequence[Example]):
    """A dataset on disk, read at random.

    Attributes:
      folder: where it is.
      card: what it is.
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
        """The example or examples at `index`; raises UserError naming the file where it is damaged."""
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
        """The examples as they are on disk, read together; raises UserError naming the file where it is damaged."""
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
    """Writes `examples` as one record file and its card into `folder`; equal input gives equal bytes.

    Args:
      folder: is made where it is not there.
      examples: one at least, all of one form.
      vocabulary_digest, provenance, scores: as on the `Card`.
      name: of the record file, without its suffix.

    Raises:
      UserError: there is no example, examples differ in form, or the disk is full or cannot be written.
    """
    write_chunk(folder, name, examples)
    path = at(folder)
    return _write_card(path, [_summary(chunk_path(path, name))], vocabulary_digest, provenance, scores)


def write_chunk(folder: _Path, name: str, examples: Iterable[Example]) -> Chunk:
    """Writes `examples` as the record file `name` in `folder`, in place of an earlier one of that name.

    Until the file is whole and on the disk it has another name, so a kill leaves the earlier one or none.

    Raises:
      UserError: there is no example, examples differ in form, or the disk is full or cannot be written.
    """
    path = chunk_path(folder, name)
    summary = _Summary(str(path))
    with _made_in(path.parent) as made_in:
        partial = made_in / path.with_suffix(".partial").name
        try:
            _write_records(partial, path, summary.watch(examples))
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
    """A folder of this machine for a file that is to be in `folder`: that one, if it is on this machine."""
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
    """Examples of a record file, where `count` go into files of one size: few enough files to be open at once."""
    return max(_PART, -(-count // _FILES))


def chunk_path(folder: _Path, name: str) -> AnyPath:
    """The record file of a chunk; it is there when the chunk is whole."""
    return at(folder) / f"{name}{_SUFFIX}"


def close_dataset(
    folder: _Path, *, vocabulary_digest: str, provenance: Mapping[str, Any], scores: str = Card.scores
) -> Card:
    """Writes the card of the chunks in `folder`, in the order of their names; the dataset is complete with it.

    Args:
      folder: has the chunks.
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
    """Provenance of a dataset that is made from others, with all of theirs: the chain holds though folders move.

    Args:
      made_by: what made it.
      inputs: the datasets, by what they are to it.
      facts: what else decides its content, as JSON values.
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
    """The dataset in `folder`, after a check of its card and of its files' sizes and counts.

    Raises:
      UserError: the folder is not a finished dataset, is of another format, or was changed since its card was written.
    """
    folder = at(folder)
    dataset = Dataset(folder, _read_card(folder / CARD))
    for chunk, file, reader in zip(dataset.card.files, dataset._files, dataset._readers, strict=True):
        size, count = file.stat().st_size, reader.num_records()
        if (size, count) != (chunk.bytes, chunk.count):
            raise UserError(
                f"{folder / chunk.name} has {count} records in {size} bytes, its card says {chunk.count} in "
                f"{chunk.bytes}: prepare the dataset again"
            )
    return dataset


def verify_dataset(dataset: Dataset) -> None:
    """Reads every file; raises UserError if one is not what the card says, naming the record that is damaged."""
    for chunk, file in zip(dataset.card.files, dataset._files, strict=True):
        path = dataset.folder / chunk.name
        if _sha256(file) != chunk.sha256:
            collections.deque(_read_all(path), maxlen=0)
            raise UserError(f"{path} was changed since its card was written: prepare the dataset again")


def discard_damaged(folder: _Path) -> list[str]:
    """Removes the record files of a finished dataset that are not what its card says; the names of what was not whole.

    A card that cannot be read is removed itself: the files that are there are read again when the dataset is closed.
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
    """Removes the chunks of a folder whose names are unwanted, and the card with them: it says what is there."""
    path = at(folder)
    for chunk in [each for each in path.glob(f"*{_SUFFIX}") if unwanted(each.stem)]:
        (path / CARD).unlink(missing_ok=True)
        chunk.unlink()


def is_intact(path: AnyPath, sha256: str) -> bool:
    """Whether a file is there with the content that it was written with."""
    return path.is_file() and _sha256(path) == sha256


class _Summary:
    """Counts and longest lengths of the examples that pass by, and whether they have one form."""

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
            raise UserError(f"{self.where} would hold no example: check what was dropped before it")

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
    """A chunk and how many of its prompts and responses have each length."""

    chunk: Chunk
    prompt_lengths: Mapping[int, int]
    response_lengths: Mapping[int, int]


def _keep_summary(path: AnyPath, chunk: Chunk, summary: _Summary) -> None:
    """Before the chunk has its name: a summary that no file fits does no harm."""
    lengths = [sorted(counts.items()) for counts in (summary.prompt_lengths, summary.response_lengths)]
    kept = path.parent / CHUNKS / f"{path.stem}.json"
    kept.parent.mkdir(exist_ok=True)
    write_bytes(kept, json.dumps([dataclasses.asdict(chunk), *lengths]).encode())


def _summary(path: AnyPath) -> _Known:
    """What was kept of a chunk, or, where nothing was or the file has changed since, what reading it gives."""
    kept = path.parent / CHUNKS / f"{path.stem}.json"
    if kept.exists():
        chunk, prompts, responses = json.loads(kept.read_text())
        if chunk["sha256"] == _sha256(path):
            return _Known(Chunk(**chunk), dict(prompts), dict(responses))
    summary = _Summary(str(path))
    collections.deque(summary.watch(_read_all(path)), maxlen=0)
    return _Known(summary.chunk(path.name, _copy_here(path)), summary.prompt_lengths, summary.response_lengths)


def _write_records(partial: pathlib.Path, path: AnyPath, examples: Iterable[Example]) -> None:
    """Writes the file `partial`, which is to become `path`; what `examples` raises passes through as it is."""
    with _writing(path):
        partial.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    try:
        for example in examples:
            record = encode(example)
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
    """A record file, or this machine's copy of one in a bucket, whose digest is computed where it is not known."""
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
        # A damaged file counts no records; reading one tells why.
        reader.read_all()
        reason = "it holds no records"
    except RuntimeError as error:
        reason = _first_clause(error)
        if os.strerror(errno.EMFILE) in reason:
            raise UserError(f"cannot open {path} ({reason}): raise the limit, as ulimit -n 65536 does") from None
    raise UserError(f"{path} is not a whole record file ({reason}): prepare the dataset again")


_DAMAGE = (RuntimeError, ValueError, KeyError, TypeError, msgpack.UnpackException)


def _missing(path: AnyPath) -> UserError:
    return UserError(f"{path} is missing, though the card names it: prepare the dataset again")


def _damaged(path: AnyPath, row: int, error: Exception) -> UserError:
    return UserError(f"record {row} of {path} cannot be read ({_first_clause(error)}): prepare the dataset again")


@contextlib.contextmanager
def _writing(path: AnyPath) -> Iterator[None]:
    """Turns what a full or unwritable disk raises into one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise _unwritable(path, error.strerror or str(error), full) from None
    except RuntimeError as error:  # ArrayRecord's writer knows no OSError.
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
        provenance=json.loads(json.dumps(dict(provenance))),  # As it will be read: lists for tuples.
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
                f"{folder / chunk.name} has {chunk.responses_per_prompt} responses a prompt, {first.name} has "
                f"{first.responses_per_prompt}: keep them in two datasets"
            )
        for name in TOKEN_FIELDS:
            if getattr(chunk, name) != getattr(first, name):
                raise UserError(
                    f"one of {folder / chunk.name} and {first.name} has {name}: give them for all or for none"
                )


def _add_up(counts: Iterable[Mapping[int, int]]) -> dict[str, Any]:
    return summarise_lengths(sum(map(collections.Counter, counts), collections.Counter()))


def _read_card(path: AnyPath) -> Card:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"it is of format {version}, this version reads {FORMAT_VERSION}: prepare it again")
        content["files"] = tuple(Chunk(**chunk) for chunk in content["files"])
        content["fields"] = tuple(content["fields"])
        card = Card(**content)
        if not (isinstance(card.provenance, dict) and isinstance(card.lengths, dict)):
            raise TypeError("its provenance and lengths are tables")
        if card != dataclasses.replace(card, **_totals(card.files)):
            raise ValueError("its counts and lengths are not those of its files")
        return card
    except OSError as error:
        raise UserError(
            f"{path.parent} is not a finished dataset ({CARD}: {error.strerror}): give a prepared dataset's folder, "
            "or run the job that writes it again"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not a dataset's card ({error!r}): prepare the dataset again") from None


def _totals(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """What a card says of all its files together."""
    return {
        "count": sum(chunk.count for chunk in chunks),
        "responses_per_prompt": chunks[0].responses_per_prompt,
        "max_prompt_length": max(chunk.max_prompt_length for chunk in chunks),
        "max_response_length": max(chunk.max_response_length for chunk in chunks),
    }


def _sha256(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
