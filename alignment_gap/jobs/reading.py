"""Reads the datasets of a training job: opens and checks them once, then puts the batch of any step on the devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from alignment_gap.data.batches import (
    Bucket,
    Examples,
    OfflineSource,
    PreferenceBatch,
    check_token_ids,
    choose_buckets,
    offline_source,
)
from alignment_gap.data.records import Dataset, open_dataset, verify_dataset
from alignment_gap.data.records.log_probs import ReferenceLogProbs
from alignment_gap.errors import UserError
from alignment_gap.jobs.config import DatasetConfig
from alignment_gap.judges import REWARDS
from alignment_gap.sharding import LogicalMesh, host_rows, on_every_process, put_batch

# Where the card of a record has the lengths that the run padded its batches to.
PADDED = "padded"


@dataclasses.dataclass(frozen=True)
class Reading:
    """The datasets of a config; their files match their cards.

    Attributes:
      config: how the datasets are read.
      examples: the examples of all datasets.
      shapes: the padded shapes (P, R) of batches; each is at least as large as the one before.
    """

    config: DatasetConfig
    examples: Examples
    shapes: tuple[Bucket, ...]

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """All datasets; they agree in vocabulary, responses per prompt, fields and kind of scores."""
        return self.examples.datasets

    @property
    def digest(self) -> str:
        """The digests of the datasets, in their order."""
        return ",".join(dataset.card.digest for dataset in self.datasets)

    def batches(
        self, mesh: LogicalMesh, seed: int, microbatches: int = 1, references: Sequence[ReferenceLogProbs] = ()
    ) -> OfflineSource:
        """The batches, with the given reference log-probs; this process reads only its own rows of each."""
        (prompt_length, response_length), config = self.shapes[-1], self.config
        return offline_source(
            Examples(self.datasets, references) if references else self.examples,
            batch_size=config.batch_size,
            seed=seed,
            prompt_length=prompt_length,
            response_length=response_length,
            order=config.order,
            window=config.window,
            buckets=self.shapes[:-1],
            packing=config.packing,
            row_multiple=mesh.batch_parts * microbatches,
            weights=config.weights,
            host_rows=functools.partial(host_rows, mesh),
        )

    def bucketed(self, count: int, *, prompts_only: bool) -> Reading:
        """The same datasets, read in at most `count` buckets; the prompts alone choose them if `prompts_only`."""
        shapes = _buckets(self.examples, count, self.shapes[-1], prompts_only)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, buckets=count), shapes=shapes)

    def steps(self, asked: int | None) -> int:
        """The number of steps: the given one, or that of the epochs; raises UserError if the data has fewer."""
        epochs, size, count = self.config.epochs, self.config.batch_size, len(self.examples)
        there = None if epochs is None else epochs * count // size
        if asked is None and not there:
            raise UserError("steps is not set: set it, or set epochs to train for that many passes over the examples")
        if asked is not None and there is not None and asked > there:
            raise UserError(
                f"steps is {asked}, but {epochs} epochs of {count} examples have {there} batches of {size}: lower "
                "steps, leave it out to use all batches, or raise epochs"
            )
        return asked or there or 0


def open_reading(config: DatasetConfig, setting: str, *, prompts_only: bool = False) -> Reading:
    """Opens datasets in every process; raises UserError if one does not match its card, or they do not go together.

    Args:
      config: the datasets, and how they are read.
      setting: path of this config among the job's settings, for error messages.
      prompts_only: whether only the prompts are used, as by an online source; they alone then choose the buckets.
    """
    if config.folder is None:
        raise UserError(f"{setting}.folder is not set: give the folder of a prepared dataset")
    examples = on_every_process(lambda: _open(str(config.folder)))
    return Reading(config, examples, _shapes(config, examples, setting, prompts_only))


def has_rewards(reading: Reading) -> bool:
    """Whether the datasets' cards call the scores rewards, which only compare responses, not probabilities."""
    return reading.datasets[0].card.scores == REWARDS


def on_devices(
    batches: OfflineSource, config: DatasetConfig, mesh: LogicalMesh, vocabulary_size: int
) -> Callable[[int], PreferenceBatch]:
    """Puts batches on the devices; raises UserError if a batch has a token id outside the model's vocabulary."""

    def source(step: int) -> PreferenceBatch:
        batch = batches(step)
        check_token_ids(str(config.folder), "the model", vocabulary_size, batch.prompts, batch.responses)
        placed: PreferenceBatch = put_batch(batch, mesh, batches.rows(step))
        return placed

    return source


def _open(folders: str) -> Examples:
    datasets = [open_dataset(folder.strip()) for folder in folders.split(",")]
    for dataset in datasets:
        verify_dataset(dataset)
    return Examples(datasets)


def _shapes(config: DatasetConfig, examples: Examples, setting: str, prompts_only: bool) -> tuple[Bucket, ...]:
    largest = []
    for name in ("prompt_length", "response_length"):
        longest = max(getattr(dataset.card, f"max_{name}") for dataset in examples.datasets)
        length = getattr(config, name) or max(longest, _padded(config, examples, name))
        if length < longest:
            raise UserError(
                f"{setting}.{name} is {length}, but {config.folder} has one of {longest} tokens: raise it, or leave it "
                "out to use the longest"
            )
        largest.append(length)
    prompt, response = largest
    if config.buckets == 1:
        return ((prompt, response),)
    return _buckets(examples, config.buckets, (prompt, response), prompts_only)


def _padded(config: DatasetConfig, examples: Examples, name: str) -> int:
    """The length that an online run padded its record to, if this reads the record in its order; else 0.

    Padding changes how sums are rounded, and a replay should have the same bits as the run.
    """
    if config.order != "recorded":
        return 0
    return max(dataset.card.provenance.get(PADDED, {}).get(name, 0) for dataset in examples.datasets)


def _buckets(examples: Examples, count: int, largest: Bucket, prompts_only: bool) -> tuple[Bucket, ...]:
    lengths = examples.lengths()
    if prompts_only:
        lengths = np.column_stack([lengths[:, 0], np.full(len(lengths), largest[1])])
    return choose_buckets(lengths, count, largest)
