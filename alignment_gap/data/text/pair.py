"""A pair as text, the ways in which a record can fail to be one, and typed access to a record's fields."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Record(NamedTuple):
    """A raw record: `file:number` (from 1), its values, and the split that its container gives, or ""."""

    where: str
    values: Mapping[str, Any]
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class TextPair:
    """One prompt, its K responses and their label.

    Attributes:
      prompt: the prompt as the policy reads it, including the mark that asks for an answer.
      responses: K texts without an end mark; K = 2 is a pair, K = 1 is a response with its own label.
      scores: K numbers from 0 to 1; in a pair, the probability that this response is preferred.
      where: file and number of the record.
      split: "train", "validation", or None if the source gives none.
      fields: the file's names for the fields with the prompt and with each response.
    """

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    where: str = ""
    split: str | None = None
    fields: tuple[str, ...] = dataclasses.field(default=("prompt", "chosen", "rejected"), compare=False)

    @property
    def key(self) -> bytes:
        """16 bytes, equal for equal prompt, responses and label; the order of the responses does not matter."""
        content = json.dumps([self.prompt, sorted(zip(self.responses, self.scores, strict=True))])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:16]


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record that gave no pair. Drops are counted by reason.

    Attributes:
      reason: why, in a few words.
      where: file and number of the record.
      split: "train", "validation", or None if the source gives none.
      prompt: prompt of the record; None if it cannot be read.
    """

    reason: str
    where: str
    split: str | None = dataclasses.field(default=None, compare=False)
    prompt: str | None = dataclasses.field(default=None, compare=False)


class BadPair(Exception):
    """A pair that may be dropped: (reason, remedy)."""


class Skip(Exception):
    """A pair that its task's rules leave out and count; the user need not fix it: (reason,)."""


class Malformed(Exception):
    """A record that does not have its task's form; it is always refused: (problem, remedy or "")."""


class Fields:
    """A record's fields by role, checked as they are read.

    Errors use the field names of the user's file; `names` maps roles to them.
    """

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, str] | None = None):
        self._values = values
        self._names = names or {}

    def __contains__(self, role: str) -> bool:
        return self.name(role) in self._values

    def name(self, role: str) -> str:
        """The file's name for `role`."""
        return self._names.get(role, role)

    def value(self, role: str, null: Any = None) -> Any:
        """The value; `null` replaces a null value if it is given. Raises Malformed if the result is null."""
        name = self.name(role)
        if name not in self._values:
            raise Malformed(f"lacks the field {name!r}", "")
        value = null if self._values[name] is None else self._values[name]
        if value is None:
            raise Malformed(f"the field {name!r} is null, not {_wanted(role)}", "")
        return value

    def text(self, role: str) -> str:
        """A text; raises Malformed."""
        return as_text(self.value(role), f"the field {self.name(role)!r}")

    def group(self, role: str) -> Fields:
        """The fields of a nested object; raises Malformed."""
        value = self.value(role)
        if not isinstance(value, Mapping):
            raise Malformed(f"the field {self.name(role)!r} is {type(value).__name__}, not an object", "")
        return Fields(value)

    def rows(self, role: str) -> list[Mapping[str, Any]]:
        """A list of objects, even if the container turned it into an object of lists; raises Malformed."""
        value = self.value(role)
        if isinstance(value, Mapping):
            columns = [list(column) for column in value.values()]
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise Malformed(f"the field {self.name(role)!r} is {type(value).__name__}, not a list", "")
        for item in value:
            if not isinstance(item, Mapping):
                raise Malformed(f"the field {self.name(role)!r} holds {type(item).__name__}, not objects", "")
        return list(value)


def named(fields: Iterable[str]) -> str:
    """The fields in brackets, for an error; the counts of drops leave out brackets."""
    names = list(dict.fromkeys(fields))
    return f"({'field' if len(names) == 1 else 'fields'} {' and '.join(map(repr, names))})"


def as_text(value: Any, what: str) -> str:
    """`value`; raises Malformed unless it is a text without unpaired surrogates."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise Malformed(f"{what} is {kind}, not a text", "")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise Malformed(f"{what} holds half a surrogate pair", "write whole characters")
    return value


def _wanted(role: str) -> str:
    return "a label" if role in ("label", "preference", "preferred", "choice", "winner") else "a text"
