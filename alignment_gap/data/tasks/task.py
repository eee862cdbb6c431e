"""Tasks: what a study is run on, from the built-in posts or from a file of human pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from alignment_gap.data.records.dataset import Example
from alignment_gap.data.tasks.human_pairs import read_human_pairs, split_by_prompt
from alignment_gap.data.text import Limits, TextSourceConfig, posts, source_digest
from alignment_gap.data.text.vocabulary import Vocabulary, load_vocabulary
from alignment_gap.errors import UserError

Rubric = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], np.ndarray]
"""(prompts, responses), N of each, as token ids -> float32[N] true quality; what follows an end id is ignored."""

# Prompt ids of the posts' validation pairs start here, so that no number of training pairs reaches them.
_VALIDATION_START = 1_000_000_000


@dataclasses.dataclass(frozen=True)
class Task:
    """What a study needs of its data.

    Attributes:
      name: of the task.
      vocabulary: encodes its texts.
      pairs: training pairs, K = 2, scores (1, 0) or (0, 1) as a human would give them.
      validation: held-out pairs; no prompt of theirs is in `pairs`.
      prompt_length: most tokens of a prompt.
      response_length: most tokens of a response, the end id included.
      rubric: true quality of responses, or None where nobody knows it.
      provenance: how the pairs came about, ready for a dataset's card.
    """

    name: str
    vocabulary: Vocabulary
    pairs: Sequence[Example]
    validation: Sequence[Example]
    prompt_length: int
    response_length: int
    rubric: Rubric | None
    provenance: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class PostsTaskConfig:
    """The built-in task: posts and summaries, one pair a prompt.

    Attributes:
      kind: always "posts"; tells the config of a task from another's.
      pairs: training pairs.
      validation_pairs: held-out pairs.
      seed: of the world; everything follows from it.
      prompt_length: most tokens of a prompt.
      response_length: most tokens of a response, the end id included.
      settings: the task's difficulty.
    """

    kind: str = "posts"
    pairs: int = 20_000
    validation_pairs: int = 1_000
    seed: int = 0
    prompt_length: int = 48
    response_length: int = 12
    settings: posts.PostsSettings = posts.DEFAULT_SETTINGS

    def validate(self) -> None:
        """Raises UserError naming the first setting that is out of range."""
        for name in ("pairs", "validation_pairs"):
            _within(self, name, 1, _VALIDATION_START)
        _within(self, "seed", 0, 2**63 - 1)
        self.settings.validate()
        _within(self, "response_length", self.settings.response_words + 1)
        _within(self, "prompt_length", posts.longest_prompt(self.settings))


@dataclasses.dataclass(frozen=True)
class HumanPairsTaskConfig:
    """Human pairs of any source; see `human_pairs.read_human_pairs`.

    Attributes:
      kind: always "human_pairs"; tells the config of a task from another's.
      source: where the pairs are and how they are read.
      vocabulary_path: what `load_vocabulary` takes.
      prompt_length: most tokens of a prompt.
      response_length: most tokens of a response, the end id included.
      validation_fraction: share of the prompts that is held out.
      limit: pairs to keep, 0 for all.
      long_prompts: "refuse", "drop", or "keep_end".
      long_responses: "refuse" or "drop".
      extra_ids: sentinels that are added to a SentencePiece model's pieces.
      seed: of the split.
    """

    kind: str = "human_pairs"
    source: TextSourceConfig = TextSourceConfig()
    vocabulary_path: str = ""
    prompt_length: int = 128
    response_length: int = 64
    validation_fraction: float = 0.05
    limit: int = 0
    long_prompts: str = "drop"
    long_responses: str = "drop"
    extra_ids: int = 100
    seed: int = 0

    @property
    def limits(self) -> Limits:
        """Lengths, and what becomes of longer pairs."""
        return Limits(self.prompt_length, self.response_length, self.long_prompts, self.long_responses)

    def validate(self) -> None:
        """Raises UserError naming the first setting that is missing, unknown or out of range."""
        try:
            self.source.validate()
        except UserError as error:
            raise UserError(f"source.{error}") from None
        if not self.vocabulary_path:
            raise UserError("vocabulary_path is not set: give the path of a vocabulary")
        self.limits.validate()
        if self.limit:
            _within(self, "limit", 2)
        _within(self, "extra_ids", 0)
        _within(self, "seed", 0)
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} is out of range: set it between 0 and 1")


def build_task(config: PostsTaskConfig | HumanPairsTaskConfig) -> Task:
    """The task of a config, its pairs made or read; raises UserError where a setting or a file is unusable."""
    return posts_task(config) if isinstance(config, PostsTaskConfig) else human_pairs_task(config)


def task_vocabulary(config: PostsTaskConfig | HumanPairsTaskConfig) -> Vocabulary:
    """The vocabulary alone of a config's task."""
    if isinstance(config, PostsTaskConfig):
        return posts.vocabulary()
    return load_vocabulary(config.vocabulary_path, config.extra_ids)


def task_rubric(config: PostsTaskConfig | HumanPairsTaskConfig) -> Rubric | None:
    """True quality in a config's task, or None where nobody knows it."""
    if not isinstance(config, PostsTaskConfig):
        return None

    def rubric(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> np.ndarray:
        scores = (posts.rubric(x, y, config.settings) for x, y in zip(prompts, responses, strict=True))
        return np.fromiter(scores, np.float32, len(prompts))

    return rubric


def posts_task(config: PostsTaskConfig) -> Task:
    """The built-in task; raises UserError where a setting is out of range."""
    config.validate()

    def examples(first: int, count: int) -> list[Example]:
        return [_post_example(posts.pair(config.seed, i, config.settings)) for i in range(first, first + count)]

    return Task(
        name="posts",
        vocabulary=task_vocabulary(config),
        pairs=examples(0, config.pairs),
        validation=examples(_VALIDATION_START, config.validation_pairs),
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        rubric=task_rubric(config),
        provenance={"task": "posts", "config": dataclasses.asdict(config)},
    )


def human_pairs_task(config: HumanPairsTaskConfig) -> Task:
    """Human pairs from a source; raises UserError where the source, the vocabulary or a setting is unusable."""
    config.validate()
    vocabulary = task_vocabulary(config)
    read = read_human_pairs(config.source, vocabulary, config.limits, limit=config.limit or None)
    training, validation = split_by_prompt(read.examples, config.validation_fraction, config.seed)
    if not training or not validation:
        raise UserError(
            f"validation_fraction={config.validation_fraction} of the prompts of {len(read.examples)} pairs leaves "
            f"{len(training)} training and {len(validation)} validation pairs: change it or give more pairs"
        )
    return Task(
        name="human_pairs",
        vocabulary=vocabulary,
        pairs=training,
        validation=validation,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        rubric=task_rubric(config),
        provenance={
            "task": "human_pairs",
            "config": dataclasses.asdict(config),
            "source_digest": source_digest(config.source),
            "dropped": dict(read.dropped),
        },
    )


def rubric_preference(rubric: Rubric, examples: Sequence[Example]) -> np.ndarray:
    """Noiseless preference of each pair: float32[N], 1 where the rubric prefers the first response, 0.5 for a tie."""
    prompts = [example.prompt.tolist() for example in examples]
    first, second = (rubric(prompts, [example.responses[k].tolist() for example in examples]) for k in range(2))
    return np.asarray((np.sign(first - second) + 1) / 2, np.float32)


def _post_example(pair: posts.PostPair) -> Example:
    words = posts.vocabulary()
    responses = [[*words.encode(" ".join(response)), words.eos_id] for response in pair.responses]
    return Example(
        prompt_id=pair.post.prompt_id,
        prompt=np.array(pair.post.tokens, np.int32),
        responses=tuple(np.array(response, np.int32) for response in responses),
        scores=np.array([pair.preferred == 0, pair.preferred == 1], np.float32),
    )


def _within(config: object, name: str, low: int, high: int | None = None) -> None:
    value = getattr(config, name)
    if value < low or (high is not None and value > high):
        limit = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"{name}={value} is out of range: choose {limit}")
