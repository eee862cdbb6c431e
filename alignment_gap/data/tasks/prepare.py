"""Prepares datasets from a source of text: several processes tokenise it part by part, with the same bytes every time.

    prepared/
      train/, validation/        datasets: a card, and a record file for each part of the source
      preview.txt                some examples as text, with their boundaries
      lengths.png                histograms of the lengths
      parts.json                 counts of each part's records by split, and digests of its files
      .parts/                    state of each part; removed at the end

A part is a range of the source's records. The result for a record depends only on the settings and the source, so
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
import multiprocessing.resource_tracker
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from alignment_gap import __version__, checks
from alignment_gap.configuration import flatten, to_dict
from alignment_gap.data.records.card import END_PROMPTS, UNKNOWN
from alignment_gap.data.records.dataset import (
    CARD,
    Card,
    close_dataset,
    is_intact,
    open_dataset,
    part_size,
    write_chunk,
)
from alignment_gap.data.records.example import Example
from alignment_gap.data.records.preview import lengths_picture, preview
from alignment_gap.data.text import (
    Dropped,
    Encoded,
    EncodingError,
    Limits,
    TextPair,
    TextSource,
    TextSourceConfig,
    encode_pair,
    held_out,
    open_source,
    prompt_within,
    source_digest,
)
from alignment_gap.data.text.chat import PLAIN
from alignment_gap.data.text.vocabulary import POSTS, Vocabulary
from alignment_gap.data.text.vocabulary_loading import load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, Outbox, read_json, remove_folder, write_bytes, write_json
from alignment_gap.progress import OpenBar, progress_bar
from alignment_gap.storage import Url

_BOTH = TRAIN, VALIDATION = "train", "validation"
PREVIEW, PICTURE = "preview.txt", "lengths.png"
PARTS, SPLITS = "parts.json", "splits"
_PARTS, _SURVEY, _PROCESSES = ".parts", "survey.npz", "processes"
_SHOWN = 5

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """How to prepare datasets from a source.

    If the source has its own training and validation splits, they are kept, and `validation` has no effect.

    Attributes:
      source: the source of the pairs.
      vocabulary: SentencePiece *.model, word list *.txt, tokenizer.json or its folder, bytes, or posts.
      limits: maximum tokens of prompts and responses, and how longer ones are treated.
      end_prompts: whether prompts end with the vocabulary's end id. By default they end as its models expect: with the
        end id for T5, mT5, ByT5 and SentencePiece models without a begin id, otherwise as the tokenizer itself does.
      validation: fraction of the prompts that is held out, if the source has no splits of its own.
      seed: seed of the split.
      records_per_file: source records per record file; by default 5000, or more for a large source.
      workers: number of worker processes; by default one per core. It does not change the result.
    """

    source: TextSourceConfig = TextSourceConfig()
    vocabulary: str | None = None
    limits: Limits = Limits()
    end_prompts: bool | None = None
    validation: float = 0.02
    seed: int = 0
    records_per_file: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "records_per_file", "workers")
        if not 0 <= self.validation < 1:
            raise UserError(f"validation is {self.validation}: it must be from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class _Work:
    """The data that every worker process gets.

    Attributes:
      config: the settings, completed with the detected task, the vocabulary and the part size.
      source: the source of the pairs.
      output: folder of the datasets.
      part_size: records in a part.
    """

    config: PrepareConfig
    source: TextSource
    output: Path
    part_size: int

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        return load_vocabulary(vocabulary_place(self.config))

    @functools.cached_property
    def survey(self) -> _Survey:
        with np.load(self.output / _PARTS / _SURVEY) as arrays:
            duplicates, held = arrays["duplicates"], arrays["validation_prompts"]
            return _Survey(duplicates, bool(arrays["own_split"]), frozenset(held.tolist()))

    @property
    def parts(self) -> int:
        """The number of parts."""
        return -(-len(self.source) // self.part_size)

    def size(self, part: int) -> int:
        """The number of records in a part."""
        return min(self.part_size, len(self.source) - part * self.part_size)

    def pairs(self, part: int) -> Iterator[TextPair | Dropped]:
        """The pairs of a part, and its records that gave none."""
        start = part * self.part_size
        return self.source.read(start, start + self.size(part))

    def encode(self, pair: TextPair) -> Encoded | Dropped:
        config = self.config
        bad_pairs, ends = config.source.bad_pairs, config.end_prompts
        return encode_pair(pair, self.vocabulary, config.limits, bad_pairs=bad_pairs, end_prompts=ends)


@dataclasses.dataclass(frozen=True)
class _Survey:
    """Facts about all records, which are needed before the first one is written.

    Attributes:
      duplicates: the numbers of the pairs that repeat an earlier pair, as given by `_pair_numbers`; int64[N],
        increasing.
      own_split: whether the source has its own training and validation splits.
      validation_prompts: hashes of the prompts in that validation split.
    """

    duplicates: np.ndarray
    own_split: bool
    validation_prompts: frozenset[int]

    def duplicates_within(self, start: int, stop: int) -> frozenset[int]:
        """The duplicates in [start, stop)."""
        first, last = np.searchsorted(self.duplicates, (start, stop))
        return frozenset(self.duplicates[first:last].tolist())


@dataclasses.dataclass
class _Counts:
    """The counts of a split.

    Attributes:
      dropped: number of records that gave no example, by reason.
      cut_prompts: number of prompts that were cut to their last tokens.
      unknown_examples: number of examples with an unknown token.
      unknown_tokens: number of unknown tokens.
    """

    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cut_prompts: int = 0
    unknown_examples: int = 0
    unknown_tokens: int = 0

    def add(self, encoded: Encoded, unk_id: int | None) -> None:
        """Counts an example."""
        unknown = sum(int(np.sum(ids == unk_id)) for ids in (encoded.prompt, *encoded.responses))
        self.cut_prompts += encoded.prompt_was_cut
        self.unknown_examples += unknown > 0
        self.unknown_tokens += unknown

    def __add__(self, other: _Counts) -> _Counts:
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)]
        return _Counts(*(one + another for one, another in pairs))

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return vars(self) | {"dropped": dict(sorted(self.dropped.items()))}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> _Counts:
        """The counts from the result of `to_json`."""
        return cls(**{**values, "dropped": collections.Counter(values["dropped"])})


@dataclasses.dataclass(frozen=True)
class Preparation:
    """A source that is opened for preparation; made by `open_preparation`.

    Attributes:
      config: the settings, completed with the detected task, the vocabulary and the part size.
      source: the source of the pairs.
      part_size: records in a part.
      digests: digests of the vocabulary and of the source.
      ends_prompts: whether prompts end with the end id.
    """

    config: PrepareConfig
    source: TextSource
    part_size: int
    digests: Mapping[str, str]
    ends_prompts: bool

    def write(
        self, output: AnyPath, *, open_bar: OpenBar = progress_bar, say: Callable[[str], None] = print
    ) -> dict[str, Card]:
        """Prepares the source in the folder `output`; continues after the finished parts of a stopped run.

        A finished folder is checked, and parts that were changed are made again.

        Args:
          output: folder of the datasets.
          open_bar: opens a progress bar.
          say: prints a line.

        Returns:
          The cards of the datasets "train" and, if a pair is held out, "validation".

        Raises:
          UserError: a record of the source cannot be used, no pair is left, or the disk is full. Finished parts are
            kept.
        """
        if isinstance(output, Url):
            return self._write_in_bucket(output, open_bar, say)
        work = _Work(self.config, self.source, output, self.part_size)
        _await_processes(output)
        if (output / PARTS).exists() and not (output / _PARTS).exists() and not _reopen(work, say):
            return {path.parent.name: open_dataset(path.parent).card for path in sorted(output.glob("*/card.json"))}
        (output / _PARTS).mkdir(exist_ok=True)
        with _processes(work, self.config.workers or len(os.sched_getaffinity(0))) as run:
            _survey(work, run, open_bar)
            _write_parts(work, run, open_bar)
        return _finish(work, self, say)

    def _write_in_bucket(self, output: Url, open_bar: OpenBar, say: Callable[[str], None]) -> dict[str, Card]:
        """Prepares in a local folder, then copies it: first the record files, then the cards, the digests last."""
        if (output / PARTS).exists():
            found = _finished(output)
            if not isinstance(found, str):
                return found
            say(f"{output}: {found}: making them again")
            (output / PARTS).unlink()
        settings = json.dumps([to_dict(self.config), dict(self.digests), __version__], sort_keys=True)
        outbox = Outbox(output, settings)
        cards = self.write(outbox.folder, open_bar=open_bar, say=say)
        for name in (TRAIN, VALIDATION):
            remove_folder(output / name)
        outbox.send(last=(CARD, PARTS))
        outbox.empty()
        return cards


def open_preparation(config: PrepareConfig) -> Preparation:
    """Opens the source and the vocabulary of a config; raises UserError if one of them cannot be used."""
    vocabulary = vocabulary_place(config)
    source = open_source(config.source, vocabulary)
    size = part_size(len(source)) if config.records_per_file is None else config.records_per_file
    config = dataclasses.replace(config, source=source.config, vocabulary=vocabulary, records_per_file=size)
    loaded, ends = load_vocabulary(vocabulary), config.end_prompts
    digests = {"vocabulary_digest": loaded.digest, "source_sha256": source_digest(config.source)}
    return Preparation(config, source, size, digests, loaded.ends_prompts if ends is None else ends)


def may_change(output: AnyPath, settings: AnyPath) -> list[str]:
    """The settings that may change when a stopped preparation continues.

    A setting that refused no record so far may change from "refuse" to drop or cut, because no finished part is
    affected. If no part is finished, all settings may change: the file with the settings is removed.

    Raises:
      UserError: the folder holds other datasets.
    """
    parts = output / _PARTS
    if not settings.exists():
        if any((output / split).exists() for split in (TRAIN, VALIDATION)):
            raise UserError(f"{output} already holds {TRAIN} or {VALIDATION}: give another folder")
    elif not (output / PARTS).exists() and not list(parts.glob("*.json")):
        for name in (_PARTS, TRAIN, VALIDATION):
            remove_folder(output / name)
        settings.unlink()
    else:
        found = read_json(settings, remedy="give another folder, these settings, or remove it")
        return ["workers", *(key for key, value in found.items() if value == "refuse")]
    return []


def vocabulary_place(config: PrepareConfig) -> str:
    """Path of the vocabulary; the built-in posts have their own."""
    vocabulary = config.vocabulary
    if vocabulary is None and config.source.location == POSTS:
        return POSTS
    if vocabulary is None:
        raise UserError("vocabulary is not set: give a SentencePiece model, a tokenizer, or bytes")
    return vocabulary


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """The settings that determine the datasets, for their cards.

    `posts` is left out if the source is not the posts, and `template_date` if no template could read it.
    """
    settings = to_dict(config)
    del settings["workers"], settings["end_prompts"]
    if config.source.location != POSTS:
        del settings["source"]["posts"]
    if config.source.template in (None, PLAIN):
        del settings["source"]["template_date"]
    return settings


def _reopen(work: _Work, say: Callable[[str], None]) -> bool:
    """Reopens a finished folder if files of a part were changed, and keeps the whole parts; returns whether it did."""
    known = read_json(work.output / PARTS, remedy="remove the folder") if (work.output / PARTS).exists() else []
    whole = _whole_parts(work.output, known)
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
        if SPLITS in known[part]:  # Earlier versions did not count by split.
            write_json(partial / _known(work, part).name, known[part])
    partial.rename(work.output / _PARTS)
    return True


def _whole_parts(output: AnyPath, known: Sequence[Mapping[str, Any]]) -> list[int]:
    """The parts whose files match their digests."""
    return [
        part
        for part, one in enumerate(known)
        if all(is_intact(output / name, digest) for name, digest in one["files"].items())
    ]


def _finished(output: Url) -> dict[str, Card] | str:
    """The cards of a finished folder, or the reason why it has to be made again."""
    known = read_json(output / PARTS, remedy="remove the folder")
    if damaged := len(known) - len(_whole_parts(output, known)):
        return f"files of {damaged} of {len(known)} parts were changed"
    try:
        return {path.parent.name: open_dataset(path.parent).card for path in output.glob(f"*/{CARD}")}
    except UserError as error:
        return str(error)


class _PartSurvey(NamedTuple):
    """The survey of one part with N pairs.

    Attributes:
      keys: uint64[N, 2], equal for duplicates.
      held: bool[N], whether a pair is in the source's own validation split.
      has_training: whether any pair is in its training split.
      validation_prompts: hashes of the prompts in the validation split.
    """

    keys: np.ndarray
    held: np.ndarray
    has_training: bool
    validation_prompts: frozenset[int]


def _survey(work: _Work, run: _Run, open_bar: OpenBar) -> None:
    """Reads the whole source once, so that malformed records are found before anything is written."""
    path = work.output / _PARTS / _SURVEY
    if path.exists():
        return
    found = []
    with open_bar(len(work.source), "reading", " records") as bar:
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
    """The numbers of pairs with the key of an earlier pair in their split; empty if the source keeps duplicates."""
    if not work.source.drops_duplicates:
        return np.zeros(0, np.int64)
    numbers = np.concatenate([_pair_numbers(work, part, len(one.keys)) for part, one in enumerate(found)])
    held = np.concatenate([one.held for one in found])
    keys = np.column_stack([np.concatenate([one.keys for one in found]), held & own_split])
    _, first = np.unique(keys, axis=0, return_index=True)
    return np.delete(numbers, first)


def _pair_numbers(work: _Work, part: int, count: int) -> np.ndarray:
    """Increasing numbers for the pairs of a part, unique over all parts."""
    return part * work.part_size + np.arange(count, dtype=np.int64)


def _write_parts(work: _Work, run: _Run, open_bar: OpenBar) -> None:
    missing = [part for part in range(work.parts) if not _known(work, part).exists()]
    with open_bar(len(work.source), "tokenising", " records") as bar:
        bar.update(len(work.source) - sum(map(work.size, missing)))
        for part, _ in zip(missing, run(_write_part, missing), strict=True):
            bar.update(work.size(part))


def _write_part(work: _Work, part: int) -> None:
    """Writes the record files of a part, then its counts; this finishes the part."""
    examples: dict[str, list[Example]] = {TRAIN: [], VALIDATION: []}
    counts = {split: _Counts() for split in examples}
    start = part * work.part_size
    duplicates = work.survey.duplicates_within(start, start + work.size(part))
    numbers = itertools.count(start)
    for item in work.pairs(part):
        outcome = item if isinstance(item, Dropped) else _encode(work, item, again=next(numbers) in duplicates)
        if isinstance(outcome, Dropped):
            counts[_split_of(work, item)].dropped[outcome.reason] += 1
            continue
        encoded, split = outcome
        counts[split].add(encoded, work.vocabulary.unk_id)
        examples[split].append(example_of(encoded))
    files = {}
    for split, chosen in examples.items():
        if chosen:
            chunk = write_chunk(work.output / split, f"part-{part:05d}", chosen)
            files[f"{split}/{chunk.name}"] = chunk.sha256
    write_json(_known(work, part), {SPLITS: {split: one.to_json() for split, one in counts.items()}, "files": files})


def _encode(work: _Work, pair: TextPair, *, again: bool) -> tuple[Encoded, str] | Dropped:
    """A pair's tokens and split, or why it is dropped; `again` says that an earlier pair is equal."""
    if again:
        return Dropped("duplicate", pair.where)
    encoded = work.encode(pair)
    if isinstance(encoded, Dropped):
        return encoded
    if not work.survey.own_split:
        return encoded, _split_by_hash(work, encoded.prompt)
    if pair.split != VALIDATION and _prompt_hash(encoded.prompt) in work.survey.validation_prompts:
        return Dropped("prompt of the validation split", pair.where)
    return encoded, VALIDATION if pair.split == VALIDATION else TRAIN


def _split_of(work: _Work, item: TextPair | Dropped) -> str:
    """The split in which a dropped record is counted: that of its prompt, or train if it has no prompt."""
    if work.survey.own_split:
        return VALIDATION if item.split == VALIDATION else TRAIN
    if item.prompt is None:
        return TRAIN
    try:
        prompt = prompt_within(item.prompt, work.vocabulary, work.config.limits, work.config.end_prompts)
    except EncodingError:
        return TRAIN
    return _split_by_hash(work, prompt)


def _split_by_hash(work: _Work, prompt: np.ndarray) -> str:
    return VALIDATION if held_out(prompt.tobytes(), work.config.validation, work.config.seed) else TRAIN


def example_of(encoded: Encoded) -> Example:
    """The example of an encoded pair."""
    return Example(prompt_id(encoded.prompt), encoded.prompt, encoded.responses, encoded.scores)


def prompt_id(prompt: np.ndarray) -> int:
    """31 bits of a prompt's hash, so that equal prompts have equal ids everywhere."""
    return _prompt_hash(prompt) >> 33


def _prompt_hash(prompt: np.ndarray) -> int:
    return int.from_bytes(hashlib.sha256(prompt.tobytes()).digest()[:8], "big")


def _known(work: _Work, part: int) -> Path:
    return work.output / _PARTS / f"{part:05d}.json"


def _finish(work: _Work, preparation: Preparation, say: Callable[[str], None]) -> dict[str, Card]:
    """Writes cards, preview and picture, then removes the state of the parts; this finishes the folder."""
    known, digests = [json.loads(_known(work, part).read_text()) for part in range(work.parts)], preparation.digests
    about = {
        "made_by": "prepare",
        "command": _command(work.config),
        "version": __version__,
        **_settings(work.config),
        # Left out if false, as on cards of earlier versions.
        **({END_PROMPTS: True} if preparation.ends_prompts else {}),
        "source_sha256": digests["source_sha256"],
        "records": len(work.source),
    }
    counts = {split: sum((_Counts.from_json(one[SPLITS][split]) for one in known), _Counts()) for split in _BOTH}
    if not (work.output / TRAIN).exists():
        dropped = (counts[TRAIN] + counts[VALIDATION]).to_json()["dropped"]
        # Nothing is worth keeping, and without finished parts the same folder takes other settings.
        remove_folder(work.output / _PARTS)
        raise UserError(f"{work.config.source.location}: {_nothing_left(len(work.source), dropped)}")
    if not (work.output / VALIDATION).exists():
        counts = {TRAIN: counts[TRAIN] + counts[VALIDATION]}
    cards = {
        split: close_dataset(
            work.output / split,
            vocabulary_digest=digests["vocabulary_digest"],
            provenance=about | _counted(work, counts[split]) | {"split": split},
        )
        for split in counts
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


def _counted(work: _Work, counts: _Counts) -> dict[str, Any]:
    """The counts on a split's card; without unknown tokens if the vocabulary has no unknown id."""
    said = {name: counts.to_json()[name] for name in ("dropped", "cut_prompts")}
    if work.vocabulary.unk_id is None:
        return said
    return said | {UNKNOWN: {"examples": counts.unknown_examples, "tokens": counts.unknown_tokens}}


def _nothing_left(records: int, dropped: Mapping[str, int]) -> str:
    reasons = [f"{count} {reason}" for reason, count in dropped.items()]
    if held := records - sum(dropped.values()):
        reasons.append(f"{held} for validation or blank")
    remedies = [f"raise --{name}_length" for name in ("prompt", "response") if f"long {name}" in dropped]
    return (
        f"no pair of {records} records is left for training ({', '.join(reasons)}): "
        f"{' and '.join(remedies) or 'fix the source'}"
    )


def _command(config: PrepareConfig) -> str:
    """The command that makes the same datasets again; it leaves out the folder and the number of processes."""
    flags, defaults = _flags(config), _flags(PrepareConfig())
    words = [f"--{name}={value}" for name, value in flags.items() if value != defaults.get(name)]
    return shlex.join(["alignment-gap", "data", "prepare", f"--source={config.source.location}", *words])


def _flags(config: PrepareConfig) -> dict[str, str]:
    """The command's flags: names and values."""
    settings = to_dict(config)
    named = flatten(settings.pop("source")) | settings.pop("limits") | settings
    del named["location"], named["workers"]
    return {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in named.items()
    }


@runtime_checkable
class _Run(Protocol):
    """Applies a function of work and part to the given parts; yields the results in order."""

    def __call__(self, function: Callable[[_Work, int], Result], parts: Iterable[int]) -> Iterator[Result]: ...


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Delays ctrl-c; processes started meanwhile never receive it, so only this process handles it."""
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    listens = threading.current_thread() is threading.main_thread() and before is not signal.SIG_IGN
    if listens:  # If the main thread blocks the signal, a library's thread may receive it.
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        multiprocessing.resource_tracker.ensure_running()  # Its start unblocks the signal, so it comes first.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        if listens:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _processes(work: _Work, count: int) -> Iterator[_Run]:
    """Worker processes that have `work`, or this process if one is enough; no worker outlives this process."""
    if count <= 1:
        yield lambda function, parts: (function(work, part) for part in parts)
        return
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as pools:
        with _without_interrupts():  # A half-made pool would leave semaphores behind.
            pool = concurrent.futures.ProcessPoolExecutor(count, context, initializer=_start, initargs=(work,))
            pools.callback(pool.shutdown, cancel_futures=True)
            for _ in range(count):
                pool.submit(int)  # Each call starts a process, because none is idle yet.
        try:
            yield lambda function, parts: pool.map(functools.partial(_call, function), parts)
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a process was killed, most likely because memory ran out: run again with fewer --workers or a smaller "
                "--records_per_file; finished parts are kept"
            ) from None


_work: _Work
_held: int


def _start(work: _Work) -> None:
    """Starts a worker process: stores the work, holds a lock while it lives, and ends with its parent."""
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
    """Waits until the workers of an earlier run have ended; they notice with a delay that it was killed."""
    if (output / _PARTS / _PROCESSES).exists():
        with (output / _PARTS / _PROCESSES).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def _call(function: Callable[[_Work, int], Result], part: int) -> Result:
    return function(_work, part)
