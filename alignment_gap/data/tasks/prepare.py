"""From a source of text to prepared datasets: tokenised by several processes, part by part, the same bytes every time.

    prepared/
      train/, validation/        datasets: record files of a part of the source each, and a card
      preview.txt                some examples as text, with their boundaries
      lengths.png                histograms of the lengths
      settings.json              what it was made with
      parts.json                 what became of each part's records, and digests of the files that it made
      .parts/                    until it is finished: what is known of each part

A part is a range of the source's records. What becomes of a record depends on the settings and on the source alone, so
neither the number of processes nor a kill changes a byte.
"""

from __future__ import annotations

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from alignment_gap import __version__
from alignment_gap.configuration import flatten, to_dict
from alignment_gap.data.records.dataset import (
    Card,
    Example,
    close_dataset,
    is_intact,
    open_dataset,
    part_size,
    write_chunk,
)
from alignment_gap.data.records.preview import lengths_picture, preview
from alignment_gap.data.text import (
    Dropped,
    Encoded,
    Limits,
    TextPair,
    TextSource,
    TextSourceConfig,
    encode_pair,
    held_out,
    open_source,
    source_digest,
)
from alignment_gap.data.text.vocabulary import Vocabulary, load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import claim, locked, read_json, write_bytes, write_json
from alignment_gap.progress import progress_bar

TRAIN, VALIDATION = "train", "validation"
PREVIEW, PICTURE, SETTINGS = "preview.txt", "lengths.png", "settings.json"
PARTS = "parts.json"
_PARTS, _SURVEY, _PROCESSES = ".parts", "survey.npz", "processes"
_SHOWN = 5

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What a prepared dataset is made from, and how.

    Attributes:
      source: the pairs.
      vocabulary: what encodes them; see `load_vocabulary`.
      limits: lengths, and what becomes of a pair that is over one.
      validation: share of the prompts that is held out; where the source states a training and a validation split of
        its own, these are kept.
      seed: of the split.
      records_per_file: records of the source whose examples make one record file; 0 for `part_size` of them.
    """

    source: TextSourceConfig = TextSourceConfig()
    vocabulary: str = ""
    limits: Limits = Limits(prompt_length=512, response_length=256)
    validation: float = 0.02
    seed: int = 0
    records_per_file: int = 0

    def validate(self) -> None:
        """Raises UserError naming the first setting that is missing, unknown or out of range."""
        self.source.validate()
        self.limits.validate()
        if not self.vocabulary:
            raise UserError("vocabulary is not set: give a SentencePiece model, a tokenizer, or bytes")
        if not 0 <= self.validation < 1:
            raise UserError(f"validation={self.validation} is out of range: set it from 0 to below 1")
        if self.records_per_file < 0:
            raise UserError(f"records_per_file={self.records_per_file} is out of range: set it to 1 or more, or 0")


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every process knows; it is sent to each as it is here."""

    config: PrepareConfig
    source: TextSource
    output: Path

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return load_vocabulary(self.config.vocabulary)

    @functools.cached_property
    def survey(self) -> _Survey:
        with np.load(self.output / _PARTS / _SURVEY) as arrays:
            duplicates, held = arrays["duplicates"], arrays["validation_prompts"]
            return _Survey(duplicates, bool(arrays["own_split"]), frozenset(held.tolist()))

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-len(self.source) // self.config.records_per_file)

    def size(self, part: int) -> int:
        """Records of a part."""
        return min(self.config.records_per_file, len(self.source) - part * self.config.records_per_file)

    def pairs(self, part: int) -> Iterator[TextPair | Dropped]:
        """What the records of a part are."""
        start = part * self.config.records_per_file
        return self.source.read(start, start + self.size(part))

    def encode(self, pair: TextPair) -> Encoded | Dropped:
        return encode_pair(pair, self.vocabulary, self.config.limits, bad_pairs=self.config.source.bad_pairs)


@dataclasses.dataclass(frozen=True)
class _Survey:
    """What has to be known of all records before one can be written.

    Attributes:
      duplicates: int64[N], increasing: the numbers of the pairs that came before, as `_pair_numbers` gives them.
      own_split: whether the source states a training and a validation split.
      validation_prompts: hashes of the prompts in that validation split.
    """

    duplicates: np.ndarray
    own_split: bool
    validation_prompts: frozenset[int]

    def duplicates_within(self, start: int, stop: int) -> frozenset[int]:
        """Those from `start` on and below `stop`."""
        first, last = np.searchsorted(self.duplicates, (start, stop))
        return frozenset(self.duplicates[first:last].tolist())


def prepare(
    config: PrepareConfig, output: Path, *, processes: int = 1, say: Callable[[str], None] = print
) -> dict[str, Card]:
    """Prepares `config.source` in the folder `output`, from its finished parts where an earlier run was stopped.

    A finished folder is looked through, and what has changed in it since is made again.

    Args:
      config: from what, and how.
      output: the folder.
      processes: how many work at it.
      say: prints a line.

    Returns:
      The cards of the datasets "train" and, where a pair is held out, "validation".

    Raises:
      UserError: a setting, the vocabulary, the source or one of its records cannot be used, no pair is left, the folder
        was made with other settings, or the disk is full; the parts that are finished are kept.
    """
    config.validate()
    source = open_source(config.source)
    size = config.records_per_file or part_size(len(source))
    config = dataclasses.replace(config, source=source.config, records_per_file=size)
    work = _Work(config, source, output)
    digests = {
        "vocabulary_digest": load_vocabulary(config.vocabulary).digest,
        "source_sha256": source_digest(config.source),
    }
    with locked(output):
        _await_processes(output)
        _claim(output / SETTINGS, flatten(to_dict(config)) | digests | {"version": __version__})
        if not (output / _PARTS).exists() and not _reopen(work, say):
            say(f"{output}: finished before")
            return {path.parent.name: open_dataset(path.parent).card for path in sorted(output.glob("*/card.json"))}
        with _processes(work, processes) as run:
            _survey(work, run)
            _write_parts(work, run)
        return _finish(work, digests, say)


def _claim(path: Path, settings: dict[str, Any]) -> None:
    """Takes the folder for these settings.

    What refused nothing so far may drop or cut from now on, for no finished part is affected. Where no part is finished
    there is nothing to keep, and any settings will do.
    """
    remedy = "give another folder, these settings, or remove it"
    may_change: list[str] = []
    parts = path.parent / _PARTS
    if path.exists():
        if parts.exists() and not list(parts.glob("*.json")):
            for name in (_PARTS, TRAIN, VALIDATION):
                shutil.rmtree(path.parent / name, ignore_errors=True)
            parts.mkdir()
            path.unlink()
        else:
            may_change = [key for key, value in read_json(path, remedy=remedy).items() if value == "refuse"]
    else:
        if any((path.parent / split).exists() for split in (TRAIN, VALIDATION)):
            raise UserError(f"{path.parent} holds {TRAIN} or {VALIDATION} of something else: give another folder")
        parts.mkdir(exist_ok=True)
    claim(path, settings, remedy=remedy, may_change=may_change)


def _reopen(work: _Work, say: Callable[[str], None]) -> bool:
    """Whether a finished folder had to be opened again, with those parts finished whose files are whole."""
    known = read_json(work.output / PARTS, remedy="remove the folder") if (work.output / PARTS).exists() else []
    whole = [
        part
        for part, one in enumerate(known)
        if all(is_intact(work.output / name, digest) for name, digest in one["files"].items())
    ]
    reason = f"files of {work.parts - len(whole)} of {work.parts} parts were changed"
    if len(whole) == work.parts:
        try:
            for split in {name.split("/")[0] for one in known for name in one["files"]}:
                open_dataset(work.output / split)
            return False
        except UserError as error:
            reason = str(error)
    say(f"{work.output}: {reason}: making them again")
    partial = work.output / f"{_PARTS}.partial"
    partial.mkdir(exist_ok=True)
    for part in whole:
        write_json(partial / _known(work, part).name, known[part])
    partial.rename(work.output / _PARTS)
    return True


class _PartSurvey(NamedTuple):
    """Of one part's N pairs.

    Attributes:
      keys: uint64[N, 2], equal for duplicates.
      held: bool[N], whether a pair is of the source's own validation split.
      has_training: whether one is of its training split.
      validation_prompts: hashes of the prompts of the validation split.
    """

    keys: np.ndarray
    held: np.ndarray
    has_training: bool
    validation_prompts: frozenset[int]


def _survey(work: _Work, run: _Run) -> None:
    """Reads the whole source once: what is malformed is told before anything is written."""
    path = work.output / _PARTS / _SURVEY
    if path.exists():
        return
    found = []
    with progress_bar(len(work.source), "reading", " records") as bar:
        for part, one in enumerate(run(_survey_part, range(work.parts))):
            found.append(one)
            bar.update(work.size(part))
    own = any(one.has_training for one in found) and any(one.held.any() for one in found)
    held = frozenset().union(*(one.validation_prompts for one in found)) if own else frozenset()
    buffer = io.BytesIO()
    np.savez(
        buffer,
        duplicates=_duplicates(work, found, own),
        own_split=own,
        validation_prompts=np.array(sorted(held), np.uint64),
    )
    write_bytes(path, buffer.getvalue())


def _survey_part(work: _Work, part: int) -> _PartSurvey:
    pairs = [pair for pair in work.pairs(part) if isinstance(pair, TextPair)]
    keys = np.frombuffer(b"".join(pair.key for pair in pairs), "<u8").reshape(-1, 2)
    encoded = [work.encode(pair) for pair in pairs if pair.split == VALIDATION]
    prompts = frozenset(_prompt_hash(one.prompt) for one in encoded if isinstance(one, Encoded))
    held = np.array([pair.split == VALIDATION for pair in pairs], bool)
    return _PartSurvey(keys, held, any(pair.split == TRAIN for pair in pairs), prompts)


def _duplicates(work: _Work, found: list[_PartSurvey], own_split: bool) -> np.ndarray:
    """The numbers of the pairs whose key an earlier one of their split has, where the source is to be rid of them."""
    if not work.source.drops_duplicates:
        return np.zeros(0, np.int64)
    numbers = np.concatenate([_pair_numbers(work, part, len(one.keys)) for part, one in enumerate(found)])
    held = np.concatenate([one.held for one in found])
    keys = np.column_stack([np.concatenate([one.keys for one in found]), held & own_split])
    _, first = np.unique(keys, axis=0, return_index=True)
    return np.delete(numbers, first)


def _pair_numbers(work: _Work, part: int, count: int) -> np.ndarray:
    """A number for each pair of a part, increasing and of no other part."""
    return part * work.config.records_per_file + np.arange(count, dtype=np.int64)


def _write_parts(work: _Work, run: _Run) -> None:
    missing = [part for part in range(work.parts) if not _known(work, part).exists()]
    with progress_bar(len(work.source), "tokenising", " records") as bar:
        bar.update(len(work.source) - sum(map(work.size, missing)))
        for part, _ in zip(missing, run(_write_part, missing), strict=True):
            bar.update(work.size(part))


def _write_part(work: _Work, part: int) -> None:
    """Writes the record files of a part, then what became of its records, with which it is finished."""
    examples: dict[str, list[Example]] = {TRAIN: [], VALIDATION: []}
    dropped: collections.Counter[str] = collections.Counter()
    cut = 0
    start = part * work.config.records_per_file
    duplicates = work.survey.duplicates_within(start, start + work.size(part))
    numbers = itertools.count(start)
    for item in work.pairs(part):
        outcome = item if isinstance(item, Dropped) else _encode(work, item, again=next(numbers) in duplicates)
        if isinstance(outcome, Dropped):
            dropped[outcome.reason] += 1
            continue
        encoded, split = outcome
        cut += encoded.prompt_was_cut
        examples[split].append(example_of(encoded, _prompt_id(encoded.prompt)))
    files = {}
    for split, chosen in examples.items():
        if chosen:
            chunk = write_chunk(work.output / split, f"part-{part:05d}", chosen)
            files[f"{split}/{chunk.name}"] = chunk.sha256
    write_json(_known(work, part), {"dropped": dropped, "cut_prompts": cut, "files": files})


def _encode(work: _Work, pair: TextPair, *, again: bool) -> tuple[Encoded, str] | Dropped:
    """A pair's tokens and the split that it belongs to, or why there are none; `again` where it came before."""
    if again:
        return Dropped("duplicate", pair.where)
    encoded = work.encode(pair)
    if isinstance(encoded, Dropped):
        return encoded
    if not work.survey.own_split:
        held = held_out(encoded.prompt.tobytes(), work.config.validation, work.config.seed)
        return encoded, VALIDATION if held else TRAIN
    if pair.split != VALIDATION and _prompt_hash(encoded.prompt) in work.survey.validation_prompts:
        return Dropped("prompt of the validation split", pair.where)
    return encoded, VALIDATION if pair.split == VALIDATION else TRAIN


def example_of(encoded: Encoded, prompt_id: int) -> Example:
    """The record of a dataset."""
    return Example(prompt_id, encoded.prompt, encoded.responses, encoded.scores)


def _prompt_hash(prompt: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:8], "big")


def _prompt_id(prompt: np.ndarray) -> int:
    """31 bits of the prompt's hash: equal prompts have equal ids, in every dataset, whatever else there is."""
    return _prompt_hash(prompt) >> 33


def _known(work: _Work, part: int) -> Path:
    return work.output / _PARTS / f"{part:05d}.json"


def _finish(work: _Work, digests: dict[str, str], say: Callable[[str], None]) -> dict[str, Card]:
    """Cards, preview and picture; the folder is finished when what is known of the parts is gone."""
    known = [json.loads(_known(work, part).read_text()) for part in range(work.parts)]
    dropped = sum((collections.Counter(one["dropped"]) for one in known), collections.Counter[str]())
    about = {
        "made_by": "prepare",
        "command": _command(work.config),
        "version": __version__,
        **to_dict(work.config),
        "source_sha256": digests["source_sha256"],
        "records": len(work.source),
        "dropped": dict(sorted(dropped.items())),
        "cut_prompts": sum(one["cut_prompts"] for one in known),
    }
    if not (work.output / TRAIN).exists():
        raise UserError(f"{work.config.source.location}: {_nothing_left(len(work.source), about['dropped'])}")
    cards = {
        split: close_dataset(
            work.output / split, vocabulary_digest=digests["vocabulary_digest"], provenance=about | {"split": split}
        )
        for split in (TRAIN, VALIDATION)
        if (work.output / split).exists()
    }
    text = preview(open_dataset(work.output / TRAIN), work.vocabulary, _SHOWN)
    write_bytes(work.output / PREVIEW, text.encode())
    try:
        write_bytes(work.output / PICTURE, lengths_picture(cards[TRAIN].lengths))
    except UserError as error:
        say(f"no {PICTURE}: {error}")
    write_json(work.output / PARTS, known)
    shutil.rmtree(work.output / _PARTS)
    return cards


def _nothing_left(records: int, dropped: Mapping[str, int]) -> str:
    reasons = [f"{count} {reason}" for reason, count in dropped.items()]
    if held := records - sum(dropped.values()):
        reasons.append(f"{held} for validation or blank")
    shown = ", ".join(reasons)
    return f"no pair of {records} records is left for training ({shown}): raise the lengths or mend the source"


def _command(config: PrepareConfig) -> str:
    """The command that makes the same again, but for the folder and the number of processes."""
    settings = to_dict(config)
    flat = {"source": config.source.location} | settings["source"] | settings["limits"] | settings
    plain = to_dict(PrepareConfig())
    default = plain["source"] | plain["limits"] | plain
    words = [
        f"--{name}={value}"
        for name, value in flat.items()
        if name not in ("location", "limits") and value != default.get(name) and not isinstance(value, dict)
    ]
    return shlex.join(["alignment-gap", "data", "prepare", f"--source={config.source.location}", *words])


class _Run(Protocol):
    """Applies a function of work and part to parts, one result after another in their order."""

    def __call__(self, function: Callable[[_Work, int], Result], parts: Iterable[int]) -> Iterator[Result]: ...


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Keeps ctrl-c back; processes that are started meanwhile never get it, and leave it to this one."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    listens = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
    if listens:  # A thread of a library's own may be given the signal that the main thread blocks, and interrupts it.
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        if listens:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _processes(work: _Work, count: int) -> Iterator[_Run]:
    """Processes that know `work`, or this one where one is enough; none outlives this process."""
    if count <= 1:
        yield lambda function, parts: (function(work, part) for part in parts)
        return
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(count, context, initializer=_start, initargs=(work,))
    try:
        with _without_interrupts():
            for _ in range(count):
                pool.submit(int)  # Each starts a process, for none is idle yet.
        yield lambda function, parts: pool.map(functools.partial(_call, function), parts)
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "a process was killed, most likely for want of memory: run again with fewer --processes or a smaller "
            "--records_per_file; finished parts are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_work: _Work
_held: int


def _start(work: _Work) -> None:
    """In a new process: remembers the work, says as long as it lives that it is there, and ends with the parent."""
    global _work, _held
    _work = work
    _held = os.open(work.output / _PARTS / _PROCESSES, os.O_RDWR | os.O_CREAT)
    fcntl.flock(_held, fcntl.LOCK_SH)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _await_processes(output: Path) -> None:
    """Waits until those of an earlier run have ended, which see a moment late that it was killed."""
    if (output / _PARTS / _PROCESSES).exists():
        with (output / _PARTS / _PROCESSES).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def _call(function: Callable[[_Work, int], Result], part: int) -> Result:
    return function(_work, part)
