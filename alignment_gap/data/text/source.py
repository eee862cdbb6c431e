"""Reads pairs from a source: opens its records, parses them by task, and refuses or drops unusable ones."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Iterator

from alignment_gap import checks
from alignment_gap.data.text.chat import DATE, PLAIN, Template, check_date, load_template, own_template
from alignment_gap.data.text.containers import Joined, open_records, split_name
from alignment_gap.data.text.forms import PROMPT_MARK, TASKS, Parsing, SourceTask, detect
from alignment_gap.data.text.json_lines import unreadable
from alignment_gap.data.text.pair import BadPair, Dropped, Fields, Malformed, Record, Skip, TextPair, named
from alignment_gap.data.text.posts import PostsConfig
from alignment_gap.data.text.posts_records import PostsRecords
from alignment_gap.data.text.trl import is_conversation, parse_fields, parse_labels, roles_of
from alignment_gap.data.text.vocabulary import POSTS
from alignment_gap.errors import UserError

AUTO = "auto"
POLICIES = ("refuse", "drop")
# Maximum number of field names in an error.
_SHOWN = 12
_TURN_MARKS = ("\n\nHuman:", PROMPT_MARK)


@dataclasses.dataclass(frozen=True)
class TextSourceConfig:
    """Where pairs come from, and how they are read.

    Records are always refused if they are not JSON or not UTF-8, lack a field, or have a label out of range. A bad pair
    is a pair that states no preference: identical responses, an empty prompt or response, or no common prompt.

    Attributes:
      location: file, folder, hub: or tfds: name; several of these separated by commas; or posts for the built-in task.
      task: form of the records; auto detects it from the first record.
      fields: columns of your own pairs: prompt=question,chosen=good,rejected=bad.
      labels: meaning of a label's values: model=1,reference=0,both=0.5,=drop.
      template: how conversations are written: plain, a jinja file, or a tokenizer's folder. None for the vocabulary's
        own chat template or, if it has none, plain.
      template_date: the day that a template which writes today's date takes for today, as YEAR-MONTH-DAY. It does not
        change, so that datasets do not depend on the day on which they are made.
      ties: drop pairs without a preference, or keep them with scores (0.5, 0.5).
      duplicates: drop or keep repeated pairs; by default the task decides.
      bad_pairs: refuse or drop pairs that state no preference.
      posts: settings of the built-in task, for the location posts.
    """

    location: str | None = None
    task: str = AUTO
    fields: str | None = None
    labels: str | None = None
    template: str | None = None
    template_date: str = DATE
    ties: str = "drop"
    duplicates: str | None = None
    bad_pairs: str = "refuse"
    posts: PostsConfig = PostsConfig()

    def __post_init__(self) -> None:
        checks.one_of(self, (AUTO, *TASKS), "task")
        checks.one_of(self, ("drop", "keep"), "ties", "duplicates")
        checks.one_of(self, POLICIES, "bad_pairs")
        check_date("template_date", self.template_date)
        parse_fields(self.fields)
        parse_labels(self.labels)
        if self.posts != PostsConfig() and self.location != POSTS:
            raise UserError(
                f"posts is set with the location {self.location!r}: set it only with the location {POSTS!r}"
            )


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Pairs as text; made by `open_source`. It can be pickled, so several processes can each read a range.

    Attributes:
      config: the settings, with the detected task, and the template that conversations are written with.
      records: the records that the pairs are read from.
      template: template for conversations.
      roles: the roles in the first record, if the pairs are the user's own.
    """

    config: TextSourceConfig
    records: Joined
    template: Template
    roles: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def files(self) -> tuple[pathlib.Path, ...]:
        """The files of the source."""
        return self.records.files

    @property
    def task(self) -> SourceTask:
        """How its records are read."""
        return TASKS[self.config.task]

    @property
    def drops_duplicates(self) -> bool:
        """Whether only the first pair with a given `TextPair.key` is kept."""
        return self.task.drops_duplicates if self.config.duplicates is None else self.config.duplicates == "drop"

    @functools.cached_property
    def _parsing(self) -> Parsing:
        return Parsing(self.roles, parse_fields(self.config.fields), parse_labels(self.config.labels), self.template)

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[TextPair | Dropped]:
        """The pairs in the records [start, stop), counted from 0; `Dropped` for each record without a pair.

        Raises:
          UserError: a record is malformed, or is a bad pair while these are refused; it gives file, number and remedy.
        """
        for record in self.records.read(start, stop):
            yield self._pair(record)

    def _pair(self, record: Record) -> TextPair | Dropped:
        split, prompt = split_name(record.split), None
        try:
            pair = self.task.parse(record.values, self._parsing)
            pair = dataclasses.replace(pair, where=record.where, split=split_name(pair.split or record.split))
            split, prompt = pair.split, pair.prompt
            _check(pair)
        except Malformed as problem:
            reason, remedy = problem.args
            raise UserError(f"{record.where}: {reason}: {remedy or self.task.form}") from None
        except Skip as problem:
            return Dropped(problem.args[0], record.where, split, prompt)
        except BadPair as problem:
            dropped = refuse_or_drop(problem, record.where, "bad_pairs", self.config.bad_pairs)
            return dataclasses.replace(dropped, split=split, prompt=prompt)
        if self.config.ties == "drop" and set(pair.scores) == {0.5}:
            return Dropped("tie", record.where, split, prompt)
        return pair


def open_source(config: TextSourceConfig, vocabulary: str | None = None) -> TextSource:
    """Opens the source of a config; reads only the first record.

    Args:
      config: the settings.
      vocabulary: path of the vocabulary, whose own chat template writes conversations if the settings name none.

    Raises:
      UserError: the location is missing, cannot be read or holds no record; the first record lacks a named field, or
        holds texts for which there is a template.
    """
    records = _records(config)
    first = next(iter(records.read()), None)
    if first is None:
        raise UserError(f"{config.location} holds no record: give a file with a pair on each line, or a row for each")
    names = parse_fields(config.fields)
    for name in names.values():
        if name not in first.values:
            there = ", ".join(map(repr, list(first.values)[:_SHOWN]))
            raise UserError(f"{first.where}: --fields names the field {name!r}, but the record has only {there}")
    if config.task == AUTO:
        config = dataclasses.replace(config, task="pairs" if names else detect(first.values))
    fields = Fields(first.values, names)
    if config.labels is not None and not {"label", "preference"}.intersection(roles_of(fields)):
        raise UserError(f"labels is {config.labels!r}, but {first.where} has no label: leave it out")
    config = dataclasses.replace(config, template=_template(config, fields, first.where, vocabulary))
    return TextSource(config, records, load_template(config.template or PLAIN, config.template_date), roles_of(fields))


def _template(config: TextSourceConfig, fields: Fields, where: str, vocabulary: str | None) -> str | None:
    """The template of the settings, or the vocabulary's own; None if the first record holds texts."""
    own = config.task == "pairs" and any(is_conversation(fields.value(role)) for role in roles_of(fields))
    if own or config.task == "chat_arena":
        return own_template(vocabulary) if config.template is None else config.template
    if config.template not in (None, PLAIN):
        raise UserError(
            f"template is {config.template!r}, but {where} holds texts, which are used as they are: write messages "
            "{role, content} in place of texts, or leave template out"
        )
    return config.template


def _records(config: TextSourceConfig) -> Joined:
    """The records of a source. "posts" is the built-in task, even if a file has this name; "./posts" is the file."""
    if config.location is None:
        raise UserError("there is no source: give the path of a file or folder, or posts for the built-in task")
    if config.location == POSTS:
        return Joined((PostsRecords(config.posts),))
    return open_records(config.location)


def refuse_or_drop(problem: BadPair, where: str, setting: str, policy: str) -> Dropped:
    """Refuses or drops an unusable pair; `policy` is the value of `setting`."""
    reason, remedy = problem.args
    if policy == "refuse":
        line = f"{where}: {reason}: {remedy}, or set --{setting}=drop"
        raise UserError(line, page="sources.md#records-that-are-not-clean") from None
    return Dropped(reason.split(" (")[0], where)


def _check(pair: TextPair) -> None:
    bare = pair.prompt
    for mark in _TURN_MARKS:
        bare = bare.replace(mark, "")
    if not bare.strip():
        raise BadPair(f"empty prompt {named(pair.fields[:1])}", "write what the human says")
    stripped = [response.strip() for response in pair.responses]
    if len(set(stripped)) < len(stripped):
        raise BadPair(f"identical pair {named(pair.fields[1:])}", "remove it, because it states no preference")
    if empty := [field for field, text in zip(pair.fields[1:], stripped, strict=True) if not text]:
        raise BadPair(f"empty response {named(empty)}", "remove the pair")


def source_digest(config: TextSourceConfig) -> str:
    """SHA-256, in hexadecimal, of the bytes of a source's files and of the identities of parts without files.

    Raises:
      UserError: a file cannot be read.
    """
    records = _records(config)
    digest = hashlib.sha256(records.identity.encode())
    for path in records.files:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unreadable(path, error) from None
    return digest.hexdigest()
