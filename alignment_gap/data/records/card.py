"""A dataset's card as text, with its provenance back to the first source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.text.chat import PLAIN
from alignment_gap.data.text.vocabulary import POSTS, Vocabulary
from alignment_gap.data.text.vocabulary_loading import load_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.folders import at

# Keys in the provenance of a prepared dataset: whether its prompts end with the end id; counts of unknown tokens.
END_PROMPTS, UNKNOWN = "end_prompts", "unknown"
# Keys of the provenance that are shown elsewhere or have long values.
_NOT_SHOWN = ("made_by", "inputs", "dropped", UNKNOWN, "source", "limits", "config")


def card_text(dataset: Dataset) -> str:
    """Describes a dataset and its provenance, as lines of text."""
    card = dataset.card
    lines = [
        f"{dataset.folder}: {card.count:,} examples of {card.responses_per_prompt} responses, {len(card.files)} files",
        f"  holds       {', '.join(card.fields)}",
        f"  scores      {card.scores}",
        *(f"  {name + 's':11} {lengths_text(card.lengths[name])}" for name in ("prompt", "response")),
        f"  digest      {card.digest}",
        f"  vocabulary  {card.vocabulary_digest}",
        "made by",
        *provenance_lines(card.provenance),
    ]
    return "\n".join(lines) + "\n"


def lengths_text(lengths: Mapping[str, Any]) -> str:
    """Lengths in tokens, as one line of text."""
    return (
        f"median {lengths['p50']}, 90 % up to {lengths['p90']}, 99 % up to {lengths['p99']}, longest {lengths['max']}"
    )


def provenance_lines(provenance: Mapping[str, Any], depth: int = 1) -> Iterator[str]:
    """Lines on how a dataset was made, then on its inputs; each generation of inputs is indented further."""
    indent = "  " * depth
    yield f"{indent}{provenance.get('made_by') or provenance.get('task') or 'unknown'}"
    for name, value in provenance.items():
        if name not in _NOT_SHOWN and value not in ("", None):
            yield f"{indent}  {name}: {value}"
    yield from (f"{indent}  {line}" for line in counted_lines(provenance))
    for part in provenance.get("inputs", ()):
        yield f"{indent}  {part['role']}: {part['folder']}, {part['count']:,} examples, digest {part['digest'][:12]}"
        yield from provenance_lines(part["provenance"], depth + 2)


def counted_lines(provenance: Mapping[str, Any]) -> Iterator[str]:
    """Lines on the dropped records and the unknown tokens of a prepared dataset, if there are any.

    Cards of earlier versions count the drops of all splits together, and do not count unknown tokens.
    """
    if dropped := provenance.get("dropped"):
        yield f"dropped: {', '.join(f'{count:,} {reason}' for reason, count in dropped.items())}"
    if (unknown := provenance.get(UNKNOWN)) and unknown["tokens"]:
        yield f"unknown: {unknown['tokens']:,} tokens in {unknown['examples']:,} examples"


def ends_prompts(dataset: Dataset) -> bool:
    """Whether the prompts of a dataset end with the vocabulary's end id, according to its first source."""
    return _ends_prompts(dataset.card.provenance)


def _ends_prompts(provenance: Mapping[str, Any]) -> bool:
    inputs = provenance.get("inputs", ())
    return bool(provenance.get(END_PROMPTS)) or any(_ends_prompts(part["provenance"]) for part in inputs)


def template_place(dataset: Dataset) -> str | None:
    """The template that conversations of a dataset's first source were written with; None if nothing says it."""
    return _template_of(dataset.card.provenance)


def _template_of(provenance: Mapping[str, Any]) -> str | None:
    own = provenance.get("source")
    if isinstance(own, Mapping) and "template" in own:
        return own["template"] or PLAIN  # A source of texts has none: they are used as they are.
    inputs = provenance.get("inputs", ())
    return next((found for part in inputs if (found := _template_of(part["provenance"]))), None)


def find_vocabulary(dataset: Dataset, given: str | None = None) -> Vocabulary:
    """The vocabulary that a dataset was encoded with.

    Args:
      dataset: the dataset.
      given: path of the vocabulary; None for its path when the first source was encoded.

    Raises:
      UserError: the path of the vocabulary is not known, the vocabulary has moved, or it is not the dataset's.
    """
    found = given or vocabulary_place(dataset)
    if not found:
        raise UserError(f"{dataset.folder} does not say where its vocabulary is: give --vocabulary")
    try:
        vocabulary = load_vocabulary(found)
    except UserError as error:
        if given:
            raise
        if at(found).exists():
            raise UserError(f"{dataset.folder} was encoded with the vocabulary {found}: {error}") from error
        raise UserError(
            f"{dataset.folder} was encoded with the vocabulary {found}: {error}; if it has moved, give its path with "
            "--vocabulary"
        ) from error
    if vocabulary.digest != dataset.card.vocabulary_digest:
        raise UserError(
            f"{dataset.folder} was encoded with the vocabulary {dataset.card.vocabulary_digest[:12]}, but {found} is "
            f"{vocabulary.digest[:12]}: give the dataset's own with --vocabulary"
        )
    return vocabulary


def vocabulary_place(dataset: Dataset) -> str | None:
    """Path of a dataset's vocabulary when its first source was encoded; None if it is not known."""
    return _vocabulary_of(dataset.card.provenance)


def _vocabulary_of(provenance: Mapping[str, Any]) -> str | None:
    """Path of the first source's vocabulary; None if it is not known."""
    if provenance.get("task") == POSTS:  # Provenance of posts in earlier versions, which had no posts source.
        return POSTS
    own = provenance.get("vocabulary") or provenance.get("config", {}).get("vocabulary_path")
    inputs = provenance.get("inputs", ())
    return own or next((found for part in inputs if (found := _vocabulary_of(part["provenance"]))), None)
