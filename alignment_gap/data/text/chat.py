"""Writes conversations as text: in the plain form, or by a checkpoint's chat template with Hugging Face's semantics."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from alignment_gap.data.text.pair import BadPair, Malformed, as_text
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at

Messages = Sequence[Mapping[str, Any]]

PLAIN = "plain"
# The day that templates take for today by default: Llama's, for when nobody gives them one. The day of the work would
# make datasets, and which prompts are held out, depend on when they were made.
DATE = "2024-07-26"
# Anthropic HH's marks, so that the conversations of all tasks look alike.
_MARKS = {"user": "\n\nHuman:", "human": "\n\nHuman:", "assistant": "\n\nAssistant:", "system": ""}


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
      source: jinja code, or "plain".
      tokens: texts of the special tokens that the template may use, such as `bos_token`.
      date: the day that `strftime_now` gives, as YEAR-MONTH-DAY; its time is midnight.
    """

    source: str = PLAIN
    tokens: tuple[tuple[str, str], ...] = ()
    date: str = DATE

    def render(self, messages: Messages, *, ask: bool) -> str:
        """The text of `messages`; with `ask` it ends with the mark that asks for an answer.

        Raises:
          BadPair: the template refuses the conversation, for example two turns of one role in succession.
        """
        if self.source == PLAIN:
            return _plain(messages, ask)
        import jinja2

        try:
            values = {"messages": list(messages), "add_generation_prompt": ask, "tools": None, "documents": None}
            today = datetime.fromisoformat(self.date)
            return _compiled(self.source).render(strftime_now=today.strftime, **values, **dict(self.tokens))
        except jinja2.TemplateError as error:
            remedy = "fix the conversation or choose another template"
            raise BadPair(f"refused by the chat template ({str(error)[:120]})", remedy) from None


def split_answers(template: Template, prompt: Messages, answers: Sequence[Messages]) -> tuple[str, tuple[str, ...]]:
    """The text of the prompt and of each answer to it.

    An answer is the text that the template writes after the prompt. The plain form removes spaces around it.

    Raises:
      BadPair: the template writes the prompt differently when an answer follows, or refuses it.
    """
    asked = template.render(prompt, ask=True)
    texts = []
    for answer in answers:
        whole = template.render([*prompt, *answer], ask=False)
        if not whole.startswith(asked):
            raise BadPair("template without a common prompt", "choose a template that only appends an answer")
        rest = whole[len(asked) :]
        texts.append(rest.strip() if template.source == PLAIN else rest)
    return asked, tuple(texts)


def messages_of(rows: Messages, field: str) -> list[dict[str, str]]:
    """Checks messages {role, content}, or ShareGPT's {from, value}, and returns the former; raises Malformed."""
    result = []
    for number, row in enumerate(rows, start=1):
        role = row.get("role", row.get("from"))
        content = row.get("content", row.get("value"))
        what = f"message {number} of the field {field!r}"
        result.append(
            {"role": as_text(role, f"the role of {what}"), "content": as_text(content, f"the text of {what}")}
        )
    if not result:
        raise Malformed(f"the field {field!r} holds no message", "")
    return result


def load_template(name: str | AnyPath, date: str = DATE) -> Template:
    """Loads a template: the plain form, a jinja file, or the template of a tokenizer's folder; `date` is its day.

    Raises:
      UserError: the template does not exist, or it is not valid jinja.
    """
    if name == PLAIN:
        return Template()
    path = at(name)
    source, tokens = folder_template(path) if path.is_dir() else (_read(path), ())
    if source is None:
        raise UserError(f'{path} has no chat template: give a jinja file, or "{PLAIN}"')
    _compiled(source)
    return Template(source, tokens, date)


def check_date(setting: str, date: str) -> None:
    """Raises UserError unless `date` is a day, as YEAR-MONTH-DAY."""
    try:
        is_day = datetime.strptime(date, "%Y-%m-%d").strftime("%Y-%m-%d") == date
    except ValueError:
        is_day = False
    if not is_day:
        raise UserError(f"{setting} is {date!r}: give a day as YEAR-MONTH-DAY, such as {DATE}")


def own_template(vocabulary: str | None) -> str:
    """The folder of a tokenizer, if it has a chat template; for any other vocabulary the plain form."""
    path = at(vocabulary or "")
    folder = path.parent if path.name == "tokenizer.json" else path
    return str(folder) if vocabulary and folder_template(folder)[0] else PLAIN


def folder_template(folder: AnyPath) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """The chat template of a tokenizer's folder, or None if it has none; and the texts of the special tokens."""
    config = _json(folder / "tokenizer_config.json")
    tokens = tuple((key, _token(value)) for key, value in config.items() if key.endswith("_token") and _token(value))
    if (folder / "chat_template.jinja").exists():
        return _read(folder / "chat_template.jinja"), tokens
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source}
        source = named.get("default")
    return source, tokens


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    try:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError('jinja2 is not installed: pip install "alignment-gap[huggingface]"') from None

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is not jinja (line {error.lineno}: {error.message}): fix it") from None


def _generation_tag() -> Any:
    """A jinja extension for `{% generation %}`, which marks the text of a model and writes nothing itself."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _plain(messages: Messages, ask: bool) -> str:
    parts = []
    for message in messages:
        if message["role"] not in _MARKS:
            raise BadPair(f"unknown role {message['role']!r}", f"use {', '.join(_MARKS)}, or a template that knows it")
        mark = _MARKS[message["role"]]
        parts.append(f"{mark} {message['content'].strip()}" if mark else message["content"].strip())
    return "".join(parts) + (_MARKS["assistant"] if ask else "")


def _token(value: Any) -> str:
    return value.get("content", "") if isinstance(value, Mapping) else value if isinstance(value, str) else ""


def _json(path: AnyPath) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): fetch the file again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: fetch the file again")
    return values


def _read(path: AnyPath) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the template {path} ({error.strerror}): give a jinja file") from None
