"""The true quality of responses; it is known for datasets made from the built-in posts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from alignment_gap.configuration import from_dict
from alignment_gap.data.records.dataset import Dataset
from alignment_gap.data.text import posts
from alignment_gap.data.text.vocabulary import POSTS

Texts = Sequence[Iterable[SupportsIndex]]
Rubric = Callable[[Texts, Texts], np.ndarray]
"""(prompts, responses) -> true quality float32[N]; N texts each, as token ids. Tokens after an end id are ignored."""


def rubric_of(dataset: Dataset) -> Rubric | None:
    """The rubric of the posts that all prompts of a dataset come from, directly or through other datasets.

    Returns:
      The rubric with the settings in the provenance. None if a source is not the posts, if two sources have posts with
      different settings, or if the dataset has another vocabulary.
    """
    sources = list(_sources(dataset.card.provenance))
    settings = _posts_settings(sources[0])
    alike = all(_posts_settings(source) == settings for source in sources)
    if settings is None or not alike or dataset.card.vocabulary_digest != posts.vocabulary().digest:
        return None

    def rubric(prompts: Texts, responses: Texts) -> np.ndarray:
        scores = (posts.rubric(x, y, settings) for x, y in zip(prompts, responses, strict=True))
        return np.fromiter(scores, np.float32, len(prompts))

    return rubric


def _sources(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The provenance of every dataset that was not made from other datasets."""
    inputs = provenance.get("inputs")
    if not inputs:
        yield provenance
        return
    for part in inputs:
        yield from _sources(part["provenance"])


def _posts_settings(provenance: Mapping[str, Any]) -> posts.PostsSettings | None:
    """The settings of the posts that a dataset was made from; None if it was not made from posts."""
    source, config = provenance.get("source"), provenance.get("config")
    stated = None
    if isinstance(source, Mapping) and source.get("location") == POSTS:
        stated = source.get("posts", {}).get("settings")
    elif provenance.get("task") == POSTS and config:  # Posts in earlier versions, which had no posts source.
        stated = config.get("settings")
    return None if stated is None else from_dict(posts.PostsSettings, stated, "settings of the posts")
