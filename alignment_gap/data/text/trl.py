"""A user's own pairs: in TRL's preference forms, or in any columns by a field mapping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from alignment_gap.data.text.chat import Messages, Template, messages_of, split_answers
from alignment_gap.data.text.pair import BadPair, Fields, Malformed, Skip, TextPair, named
from alignment_gap.errors import UserError

_COMPLETION = ("prompt", "completion", "label")
_JUDGED = ("prompt", "first", "second", "label")
_PAIR = ("prompt", "chosen", "rejected", "preference")
ROLES = tuple(dict.fromkeys(_PAIR + _JUDGED + _COMPLETION))
_DROP = "drop"
_PREFERENCE = {"first": 1.0, "second": 0.0, "tie": 0.5}
_DESIRABLE = {"true": 1.0, "false": 0.0}


def parse_fields(text: str | None) -> dict[str, str]:
    """Parses "prompt=question,chosen=good,rejected=bad" to {role: column}, and None to {}; raises UserError."""
    names = _assignments(text, "fields", "prompt=question,chosen=good,rejected=bad")
    for role in names:
        if role not in ROLES:
            raise UserError(f"fields names {role!r}: choose among {', '.join(ROLES)}")
    return names


def parse_labels(text: str | None) -> dict[str, float | str]:
    """Parses "ours=1,reference=0,=drop" to {value: probability that the first is better, or "drop"}.

    Raises:
      UserError: the text cannot be parsed, or a number is not from 0 to 1.
    """
    labels: dict[str, float | str] = {}
    for value, meaning in _assignments(text, "labels", "model=1,reference=0,both=0.5,=drop").items():
        try:
            labels[value] = _DROP if meaning == _DROP else float(meaning)
        except ValueError:
            labels[value] = -1.0
        if labels[value] != _DROP and not 0 <= float(labels[value]) <= 1:
            raise UserError(f'labels gives {value!r} the meaning {meaning!r}: give a number from 0 to 1, or "{_DROP}"')
    return labels


def roles_of(fields: Fields) -> tuple[str, ...]:
    """The roles that `parse_pair` takes from a record."""
    form = _COMPLETION if "completion" in fields else _JUDGED if "first" in fields else _PAIR
    return tuple(role for role in form if role in fields)


def parse_pair(fields: Fields, template: Template, labels: Mapping[str, float | str]) -> TextPair:
    """The pair of a record with one of these sets of roles.

    prompt, chosen, rejected: texts or conversations; if only the responses are conversations, they include the prompt.
    chosen, rejected: whole texts or conversations; the prompt is their longest common beginning.
    preference, in addition to chosen and rejected: the probability that the chosen response is better; 1 by default.
    prompt, first, second, label: the label is the probability that the first response is better.
    prompt, completion, label: one response that is good (true, 1) or bad (false, 0).

    A number in `labels` means an equal number of any type: 1 means 1.0 too. If `labels` names a number, it has to name
    all numbers that occur.

    Raises:
      Malformed: a field is missing or has the wrong type, or the label is out of range or has no meaning.
      BadPair: there is no common prompt, or the template refuses a conversation.
      Skip: `labels` says to drop this label.
    """
    if "completion" in fields:
        if "label" not in fields:
            raise Malformed(f"lacks the field {fields.name('label')!r}", 'add "label": true, for a good completion')
        score = _label(fields, {**_DESIRABLE, **labels})
        if score not in (0, 1):
            raise _out_of_range(fields, "use true or false, 1 or 0")
        prompt, responses = _texts(fields, ("completion",), template)
        return TextPair(prompt, responses, (score,), fields=_names(fields, "completion"))
    if "first" in fields:
        score = _label(fields, {**_PREFERENCE, **labels})
        prompt, responses = _texts(fields, ("first", "second"), template)
        return TextPair(prompt, responses, (score, 1 - score), fields=_names(fields, "first", "second"))
    score = _label(fields, labels, "preference") if "preference" in fields else 1.0
    prompt, responses = _texts(fields, ("chosen", "rejected"), template)
    return TextPair(prompt, responses, (score, 1 - score), fields=_names(fields, "chosen", "rejected"))


def _names(fields: Fields, *roles: str) -> tuple[str, ...]:
    """The file's names for the fields of the prompt and the responses; the prompt may be inside the responses."""
    return tuple(fields.name(role) for role in ("prompt" if "prompt" in fields else roles[0], *roles))


def _texts(fields: Fields, roles: Sequence[str], template: Template) -> tuple[str, tuple[str, ...]]:
    """Prompt and responses as text; conversations are rendered."""
    chats = [is_conversation(fields.value(role)) for role in roles]
    if any(chats) != all(chats):
        raise Malformed("holds a text and a conversation side by side", "write both responses in one form")
    if not chats[0]:
        if "prompt" in fields and is_conversation(fields.value("prompt")):
            raise Malformed("holds a conversation as its prompt and texts as responses", "write both in one form")
        texts = tuple(fields.text(role) for role in roles)
        return (fields.text("prompt"), texts) if "prompt" in fields else _common_text(texts)
    answers = [messages_of(fields.rows(role), fields.name(role)) for role in roles]
    if "prompt" in fields and is_conversation(fields.value("prompt")):
        prompt: Messages = messages_of(fields.rows("prompt"), fields.name("prompt"))
    else:
        shared = _shared(answers)
        prompt, answers = answers[0][:shared], [answer[shared:] for answer in answers]
    if not prompt:
        remedy = "begin both responses with the same message, or add a prompt"
        raise BadPair(f"no prompt {named(map(fields.name, roles))}", remedy)
    return split_answers(template, prompt, answers)


def _common_text(texts: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Splits texts after their common beginning; a space before the difference goes to the responses, as in TRL."""
    if len(texts) == 1:
        raise Malformed("lacks the field 'prompt'", "")
    size = _shared(texts)
    if size and texts[0][size - 1] == " ":
        size -= 1
    return texts[0][:size], tuple(text[size:] for text in texts)


def _shared(sequences: Sequence[Sequence[Any]]) -> int:
    """Length of the longest common beginning."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: all(item == column[0] for item in column), columns))


def _label(fields: Fields, meanings: Mapping[str, float | str], role: str = "label") -> float:
    value = fields.value(role, null="" if "" in meanings else None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    meaning = meanings.get(str(value).lower() if isinstance(value, bool) else str(value))
    numbers = {number: each for name, each in meanings.items() if (number := _number(name)) is not None}
    if meaning is None and is_number:
        meaning = numbers.get(value)  # A column of integers with a null holds 1.0 for 1.
    if meaning == _DROP:
        raise Skip("label dropped")
    if meaning is not None:
        return float(meaning)
    if is_number and numbers:
        # The labels give numbers another meaning than a probability, so this one may have another meaning too.
        raise _out_of_range(fields, f"give the meaning of {value!r} with --labels too, such as {value!r}={_DROP}", role)
    if is_number and 0 <= value <= 1:
        return float(value)
    known = "".join(f" or {name!r}" for name in meanings)
    raise _out_of_range(fields, f"use a number from 0 to 1{known}, or give its meaning with --labels", role)


def _number(name: str) -> float | None:
    """The finite number that a label's name is; None for any other name."""
    try:
        return number if math.isfinite(number := float(name)) else None
    except ValueError:
        return None


def _out_of_range(fields: Fields, remedy: str, role: str = "label") -> Malformed:
    return Malformed(f"the field {fields.name(role)!r} is {fields.value(role)!r}, out of its range", remedy)


def is_conversation(value: Any) -> bool:
    """Whether a field's value is a conversation, and not a text."""
    return not isinstance(value, str) and isinstance(value, list | tuple | Mapping)


def _assignments(text: str | None, setting: str, example: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")] if text is not None else []
    for name, equals, value in pairs:
        if not equals or not value:
            raise UserError(f"{setting} is {text!r}, which cannot be read at {name!r}: write it as {example}")
    return {name.strip(): value.strip() for name, _, value in pairs}
