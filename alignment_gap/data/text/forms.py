"""The tasks that pairs come from: how to parse the records of each, and how to detect the task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from alignment_gap.data.text.chat import Template, messages_of, split_answers
from alignment_gap.data.text.pair import BadPair, Fields, Malformed, Skip, TextPair, named
from alignment_gap.data.text.trl import parse_pair, roles_of

PROMPT_MARK = "\n\nAssistant:"
_HUMAN_MARK = "\n\nHuman:"
_POST = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
_WINNERS = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5, "tie (bothbad)": 0.5}


@dataclasses.dataclass(frozen=True)
class Parsing:
    """Settings for parsing a record; `roles` are the roles in the first record of the user's own pairs."""

    roles: tuple[str, ...]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    template: Template = Template()


@dataclasses.dataclass(frozen=True)
class SourceTask:
    """A task: one form of records.

    Attributes:
      parse: turns a record into a TextPair; raises Malformed, BadPair or Skip.
      matches: whether a record has this form.
      form: describes the form in the remedy of an error.
      drops_duplicates: whether repeated pairs are dropped; otherwise repeated judgements of a pair are kept.
    """

    parse: Callable[[Mapping[str, Any], Parsing], TextPair]
    matches: Callable[[Mapping[str, Any]], bool]
    form: str
    drops_duplicates: bool = True


def parse_dialogues(record: Mapping[str, Any], parsing: Parsing) -> TextPair:
    """Anthropic HH: two whole dialogues that agree up to their last assistant turn."""
    fields = Fields(record, parsing.names)
    return split_dialogues(fields.text("chosen"), fields.text("rejected"))


def split_dialogues(chosen: str, rejected: str) -> TextPair:
    """The prompt that both dialogues share, and their two stripped responses; raises BadPair if they share none."""
    dialogues = {"chosen": chosen, "rejected": rejected}
    if unmarked := [name for name, dialogue in dialogues.items() if PROMPT_MARK not in dialogue]:
        raise BadPair(f"no prompt {named(unmarked)}", 'each dialogue needs a "\\n\\nAssistant:" turn')
    prompts = [dialogue[: dialogue.rfind(PROMPT_MARK) + len(PROMPT_MARK)] for dialogue in dialogues.values()]
    if prompts[0] != prompts[1]:
        remedy = 'make both dialogues the same up to the last "\\n\\nAssistant:"'
        raise BadPair(f"prompts differ {named(dialogues)}", remedy)
    first, second = (dialogue[len(prompts[0]) :].strip() for dialogue in (chosen, rejected))
    return TextPair(prompts[0], (first, second), (1.0, 0.0), fields=("chosen", *dialogues))


def parse_summaries(record: Mapping[str, Any], parsing: Parsing) -> TextPair:
    """OpenAI's comparisons: a Reddit post, two summaries, and the worker's choice.

    Comparisons on CNN/DM articles are another task and are left out.
    """
    fields = Fields(record)
    post = fields.group("info")
    if not record["info"].get("post"):
        raise Skip("news article")
    summaries = [Fields(row).text("text").strip() for row in fields.rows("summaries")]
    if len(summaries) != 2:
        raise Malformed(f"the field 'summaries' holds {len(summaries)} summaries, not 2", "")
    scores = _scores(fields, "choice")
    prompt = _POST.format(**{name: post.text(name).strip() for name in ("subreddit", "title", "post")})
    split, names = record.get("split"), ("info", "summaries", "summaries")
    return TextPair(prompt, (summaries[0], summaries[1]), scores, split=split, fields=names)


def _scores(fields: Fields, role: str) -> tuple[float, float]:
    """The scores of two responses from a field that says which is better: 0 or 1."""
    better = fields.value(role)
    if isinstance(better, bool) or better not in (0, 1):
        raise Malformed(f"the field {role!r} is {better!r}, out of its range", "use 0 or 1")
    return 1.0 - better, float(better)


def parse_posts(record: Mapping[str, Any], parsing: Parsing) -> TextPair:
    """The built-in posts: two responses in the order of their generation, and the rater's choice."""
    fields = Fields(record)
    responses = (fields.text("first"), fields.text("second"))
    return TextPair(fields.text("post"), responses, _scores(fields, "preferred"), fields=("post", "first", "second"))


def parse_arena(record: Mapping[str, Any], parsing: Parsing) -> TextPair:
    """Chat arena: one user, two models, and the winner.

    The two conversations must agree up to the last answer. Conversations of several turns usually differ earlier, and
    then the judgement is not about a single response; such records are left out.
    """
    fields = Fields(record)
    winner = fields.text("winner")
    if winner not in _WINNERS:
        raise Malformed(f"the field 'winner' is {winner!r}, out of its range", f"use {', '.join(_WINNERS)}")
    names = ("conversation_a", "conversation_b")
    both = [messages_of(fields.rows(name), name) for name in names]
    if open_ends := [name for name, messages in zip(names, both, strict=True) if messages[-1]["role"] != "assistant"]:
        raise BadPair(f"no answer {named(open_ends)}", "end both conversations with an assistant's message")
    if both[0][:-1] != both[1][:-1]:
        raise Skip("several turns" if min(map(len, both)) > 2 else "prompts differ")
    if len(both[0]) < 2:
        raise BadPair(f"no prompt {named(names)}", "begin both conversations with the user's message")
    prompt, responses = split_answers(parsing.template, both[0][:-1], [messages[-1:] for messages in both])
    return TextPair(prompt, responses, (_WINNERS[winner], 1 - _WINNERS[winner]), fields=(names[0], *names))


def parse_own(record: Mapping[str, Any], parsing: Parsing) -> TextPair:
    """TRL's forms, or columns by a field mapping; see `trl.parse_pair`. All records need the form of the first."""
    fields = Fields(record, parsing.names)
    roles = roles_of(fields)
    for role in parsing.roles:
        if role not in roles:
            raise Malformed(f"lacks the field {fields.name(role)!r}, which the first record has", "")
    for role in roles:
        if role not in parsing.roles:
            raise Malformed(f"has the field {fields.name(role)!r}, which the first record lacks", "")
    return parse_pair(fields, parsing.template, parsing.labels)


def _is_dialogues(record: Mapping[str, Any]) -> bool:
    texts = [record.get("chosen"), record.get("rejected")]
    marked = all(isinstance(text, str) and _HUMAN_MARK in text and PROMPT_MARK in text for text in texts)
    return marked and "prompt" not in record


_DIALOGUES = SourceTask(
    parse_dialogues, _is_dialogues, 'write {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": "..."}'
)
TASKS: Mapping[str, SourceTask] = {
    "summarization": SourceTask(
        parse_summaries,
        lambda record: {"info", "summaries", "choice"} <= set(record),
        'write {"info": {"subreddit": ..., "title": ..., "post": ...}, "summaries": [{"text": ...}, ...], "choice": 0}',
        drops_duplicates=False,
    ),
    "helpfulness": _DIALOGUES,
    "harmlessness": _DIALOGUES,
    "chat_arena": SourceTask(
        parse_arena,
        lambda record: {"conversation_a", "conversation_b"} <= set(record),
        'write {"conversation_a": [{"role": ..., "content": ...}, ...], "conversation_b": [...], "winner": "model_a"}',
    ),
    "dialogues": _DIALOGUES,
    "posts": SourceTask(
        parse_posts,
        lambda record: set(record) == {"post", "first", "second", "preferred"},
        'write {"post": ..., "first": ..., "second": ..., "preferred": 0}',
        drops_duplicates=False,
    ),
    "pairs": SourceTask(
        parse_own,
        lambda record: True,
        'write {"prompt": ..., "chosen": ..., "rejected": ...} or map your column names with --fields',
    ),
}


def detect(record: Mapping[str, Any]) -> str:
    """The task whose form a record has. HH's two tasks have the same form, so both are "dialogues"."""
    for name in ("summarization", "chat_arena", "dialogues", "posts"):
        if TASKS[name].matches(record):
            return name
    return "pairs"
