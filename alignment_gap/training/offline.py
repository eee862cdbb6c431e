"""What a job reads: its datasets, as batches on the devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket, choose_buckets
from alignment_gap.data.batches.collation import Examples
from alignment_gap.data.batches.offline import OfflineSource, offline_source
from alignment_gap.data.records.dataset import Dataset, open_dataset, verify_dataset
from alignment_gap.data.records.log_probs import ReferenceLogProbs
from alignment_gap.errors import UserError
from alignment_gap.sharding import LogicalMesh, host_rows, put_batch


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """What a job reads.

    Attributes:
      folder: a prepared dataset, or several, separated by commas.
      weights: of each dataset, in any unit; empty for every example of all of them once an epoch.
      batch_size: prompts of a step, over all devices.
      order: "shuffle" (anew in every epoch), "recorded" or "window"; see `offline_source`.
      window: batches in a window; for order "window" only.
      prompt_length: tokens that prompts are padded to at most; 0 means the datasets' longest.
      response_length: tokens that responses are padded to at most; 0 means the datasets' longest.
      buckets: shapes that batches are padded to at most, chosen from the lengths so that padding is least; each is
        compiled once.
      packing: rows hold as many prompts with their responses as fit into so many times the longest; 0 for one prompt a
        row. Without buckets only.
      epochs: how often the data may be gone through; 0 for any number of times.
      vocabulary: that of the datasets, where it is no longer where it was; only a preference model needs it.
      prefetch: batches that are read and put on the devices ahead of their step.
    """

    folder: str = ""
    weights: tuple[float, ...] = ()
    batch_size: int = 32
    order: str = "shuffle"
    window: int = 0
    prompt_length: int = 0
    response_length: int = 0
    buckets: int = 1
    packing: int = 0
    epochs: int = 0
    vocabulary: str = ""
    prefetch: int = 2


def open_datasets(config: DatasetConfig) -> Examples:
    """The datasets of a job, every file as its card says; raises UserError where one is not, or they do not agree."""
    datasets = [open_dataset(folder.strip()) for folder in config.folder.split(",")]
    for dataset in datasets:
        verify_dataset(dataset)
    return Examples(datasets)


def batch_shapes(config: DatasetConfig, examples: Examples) -> tuple[Bucket, ...]:
    """The shapes (P, R) of a job's batches, the largest last; raises UserError where a length is below the longest."""
    largest = []
    for name in ("prompt_length", "response_length"):
        longest = max(getattr(dataset.card, f"max_{name}") for dataset in examples.datasets)
        length = getattr(config, name) or longest
        if length < longest:
            raise UserError(
                f"dataset.{name} is {length}, but {config.folder} has one of {longest} tokens: raise it, or set 0 for "
                "the longest"
            )
        largest.append(length)
    prompt, response = largest
    if config.buckets == 1:
        return ((prompt, response),)
    return choose_buckets(examples.lengths(), config.buckets, (prompt, response))


def job_steps(config: DatasetConfig, examples: Examples, steps: int) -> int:
    """The steps of a job: `steps`, or for 0 those of its epochs; raises UserError where the epochs have not as many."""
    if config.epochs < 0:
        raise UserError(f"dataset.epochs is {config.epochs}: set 1 or more, or 0 for any number of times")
    there = config.epochs * len(examples) // config.batch_size
    if not steps and not there:
        raise UserError("steps is 0: it must be at least 1, or set dataset.epochs for as many steps as they have")
    if config.epochs and steps > there:
        raise UserError(
            f"steps is {steps}, but dataset.epochs={config.epochs} of {len(examples)} examples have {there} batches of "
            f"{config.batch_size}: lower steps, set it to 0 for all of them, or raise epochs"
        )
    return steps or there


def job_batches(
    config: DatasetConfig,
    examples: Examples,
    shapes: Sequence[Bucket],
    mesh: LogicalMesh,
    *,
    seed: int,
    microbatches: int = 1,
    references: Sequence[ReferenceLogProbs] = (),
) -> OfflineSource:
    """The batches of a job, of which this process reads its rows; with stored reference log-probs where given."""
    prompt_length, response_length = shapes[-1]
    return offline_source(
        Examples(examples.datasets, references) if references else examples,
        batch_size=config.batch_size,
        seed=seed,
        prompt_length=prompt_length,
        response_length=response_length,
        order=config.order,
        window=config.window,
        buckets=shapes[:-1],
        packing=config.packing,
        row_multiple=mesh.batch_parts * microbatches,
        weights=config.weights,
        host_rows=functools.partial(host_rows, mesh),
    )


def on_devices(
    batches: OfflineSource, config: DatasetConfig, mesh: LogicalMesh, vocabulary_size: int
) -> Callable[[int], PreferenceBatch]:
    """The batches on the devices; raises UserError for one with an id outside of the model's vocabulary."""

    def source(step: int) -> PreferenceBatch:
        batch = batches(step)
        largest = max(np.max(batch.prompts), np.max(batch.responses))
        if largest >= vocabulary_size:
            raise UserError(
                f"{config.folder} has the token id {largest} but the model has vocabulary_size={vocabulary_size}: "
                "raise it, or prepare the dataset with the model's vocabulary"
            )
        placed: PreferenceBatch = put_batch(batch, mesh, batches.rows(step))
        return placed

    return source


def datasets_digest(examples: Examples) -> str:
    """The digests of a job's datasets, in their order."""
    return ",".join(dataset.card.digest for dataset in examples.datasets if isinstance(dataset, Dataset))
