"""A dataset's log-probs under the reference policy: computed once, stored beside the dataset, found by a digest.

FOLDER/
  scored.json               the number of examples of each dataset
DATASET/reference/KEY/      the log-probs; see `data.records.log_probs`
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from alignment_gap import checks
from alignment_gap.checkpoints import (
    Network,
    check_policy,
    check_vocabulary,
    find_checkpoint,
    known_network,
    read_digest,
)
from alignment_gap.configuration import to_dict
from alignment_gap.data.batches import Bucket, PreferenceBatch, Prefetched, offline_source
from alignment_gap.data.records import Dataset
from alignment_gap.data.records.log_probs import ReferenceLogProbs, ReferenceWriter, open_reference, reference_folder
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at, locked, read_json, write_json
from alignment_gap.jobs.assembly import Assembly
from alignment_gap.jobs.config import REFERENCE_LOG_PROBS, DatasetConfig, OnlineConfig
from alignment_gap.jobs.folder import MESH, Kind, Opened
from alignment_gap.jobs.reading import on_devices, open_reading
from alignment_gap.jobs.sources import Inputs, Parameters
from alignment_gap.models import Policy
from alignment_gap.progress import OpenBar
from alignment_gap.sharding import (
    LogicalMesh,
    MeshConfig,
    check_batch_size,
    first_reason,
    first_says,
    host_rows,
    is_first_process,
    make_mesh,
    on_every_process,
    on_first_process,
    to_host,
)
from alignment_gap.training import load_params, make_score

# Fields of a model's config that change how gradients are computed or layers are compiled, but not the outputs.
_OF_TRAINING = ("remat", "scan_unroll")
# In the folder of a training job: where its log-probs came from when it began.
BEGUN = "reference.json"
# In the folder of a job that scores datasets: how many examples each has.
SCORED = "scored.json"


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Log-probs to compute before the jobs that train with them.

    Attributes:
      dataset: the job's dataset; or all of its datasets, separated by commas.
      checkpoint: folder of the reference policy: a run, or a checkpoint.
      step: step of a run's checkpoint; None for the last.
      buckets: maximum number of padded shapes, as in the job.
      prompt_length: padded length of prompts in tokens, as in the job; None for the longest.
      response_length: padded length of responses in tokens, as in the job; None for the longest.
      dtype: float32 or bfloat16, as in the job's model; None for the checkpoint's dtype.
      attention: as in the job's model: auto, xla, cudnn or splash, or T5's auto, xla or pallas; None for the
        checkpoint's attention.
      batch_size: prompts at a time, over all devices.
      mesh: the device mesh.
    """

    dataset: str | None = None
    checkpoint: str | None = None
    step: int | None = None
    buckets: int = 1
    prompt_length: int | None = None
    response_length: int | None = None
    dtype: str | None = None
    attention: str | None = None
    batch_size: int = 64
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "buckets", "prompt_length", "response_length", "batch_size")

    @property
    def source(self) -> DatasetConfig:
        """The batches of the dataset."""
        return DatasetConfig(
            self.dataset,
            batch_size=self.batch_size,
            buckets=self.buckets,
            prompt_length=self.prompt_length,
            response_length=self.response_length,
        )

    def computed(self, network: Network) -> Network:
        """The checkpoint's network with the dtype and the attention of these settings."""
        changes = {name: value for name in ("dtype", "attention") if (value := getattr(self, name)) is not None}
        return dataclasses.replace(network, model=dataclasses.replace(network.model, **changes))


def open_scoring(config: ReferenceConfig) -> Opened:
    """Opens the datasets and finds the reference policy.

    Raises:
      UserError: a setting or an input cannot be used.
    """
    if config.dataset is None:
        raise UserError("dataset is not set: give the folder of a prepared dataset, or several separated by commas")
    if config.checkpoint is None:
        raise UserError("checkpoint is not set: give the folder of the reference policy")
    reading = open_reading(config.source, "dataset")
    mesh, vocabulary = make_mesh(config.mesh), reading.datasets[0].card.vocabulary_digest
    check_batch_size("batch_size", config.batch_size, mesh.batch_parts)
    checkpoint = on_every_process(lambda: find_checkpoint(at(str(config.checkpoint)), config.step))
    network = config.computed(on_every_process(lambda: known_network(checkpoint)))
    check_policy(network, str(config.checkpoint))
    check_vocabulary(network, vocabulary, config.checkpoint, config.dataset)
    policy = network.policy()
    params = Parameters(lambda: load_params(checkpoint, network, mesh), read_digest(checkpoint))
    facts = {"checkpoint.digest": params.digest, "dataset.digests": [each.card.digest for each in reading.datasets]}

    def run(folder: AnyPath, open_bar: OpenBar) -> None:
        with open_bar(len(reading.examples), "scoring", " examples") as bar:
            shared: dict[str, Any] = {"batch_size": config.batch_size, "buckets": reading.shapes}
            for dataset in reading.datasets:
                store_reference(dataset, policy, params, mesh, **shared, progress=bar.update)
        scored = {str(dataset.folder): len(dataset) for dataset in reading.datasets}
        on_first_process(lambda: write_json(folder / SCORED, scored))

    return Opened(facts, run)


def scored_summary(folder: AnyPath) -> str:
    """Says of how many examples of each dataset a finished job has stored the log-probs."""
    scored = read_json(folder / SCORED, remedy="remove it")
    return "\n".join(f"{dataset}: log-probs of {examples:,} examples" for dataset, examples in scored.items())


REFERENCE = Kind(
    name="reference",
    command="data reference",
    config=ReferenceConfig,
    open=open_scoring,
    summary=scored_summary,
    may_change=lambda folder: ("batch_size", *MESH),
    # The log-probs lie outside the folder, and may have been removed.
    repairs=True,
)


def stored_references(
    assembly: Assembly, inputs: Inputs, folder: AnyPath, open_bar: OpenBar
) -> list[ReferenceLogProbs]:
    """The stored reference log-probs of a job's datasets; an empty list if the job computes them in each step.

    A job under "auto" keeps to what it finds when it begins, and notes this in its folder: stored log-probs are rounded
    differently, so a job that is stopped would otherwise not continue as it began.
    """
    config, reading, mesh = assembly.config, inputs.reading, assembly.mesh
    moves = config.reference_every is not None
    where: str | None = config.reference_log_probs
    if where == "each_step" or moves or isinstance(config.source, OnlineConfig):
        return []
    policy, reference = assembly.policy, inputs.reference
    assert reference is not None
    # Without a reference of its own, the job reads the base of its adapters, as it is held.
    base_dtype = config.adapter.base_dtype if config.reference is None else None
    if where == "auto" and (where := _begun_with(folder)) is None:
        identities = [
            reference_identity(data, policy, reference.digest, reading.shapes, base_dtype) for data in reading.datasets
        ]
        found = [open_reference(*each) for each in zip(reading.datasets, identities, strict=True)]
        # On a slow file system one process may not see the files yet. It would run another program than the others, and
        # all would wait for each other.
        is_incomplete = first_reason("" if all(found) else "something is not stored")
        begun = {"reference_log_probs": "each_step" if is_incomplete else "stored"}
        on_first_process(lambda: write_json(folder / BEGUN, begun))
        return [] if is_incomplete else [stored for stored in found if stored]
    if where == "each_step":
        return []
    with open_bar(len(reading.examples), "scoring", " examples") as bar:
        shared: dict[str, Any] = {"batch_size": reading.config.batch_size, "buckets": reading.shapes}
        shared |= {"progress": bar.update, "base_dtype": base_dtype}
        return [store_reference(dataset, policy, reference, mesh, **shared) for dataset in reading.datasets]


def _begun_with(folder: AnyPath) -> str | None:
    """Where a job under "auto" got its log-probs from when it began; None if it begins now."""

    def read() -> int:
        path = folder / BEGUN
        if not path.exists():
            return -1
        return REFERENCE_LOG_PROBS.index(read_json(path, remedy="remove it")["reference_log_probs"])

    place = int(first_says(read))
    return None if place < 0 else REFERENCE_LOG_PROBS[place]


def reference_identity(
    dataset: Dataset, policy: Policy, digest: str, buckets: Sequence[Bucket], base_dtype: str | None = None
) -> dict[str, Any]:
    """Everything that determines a dataset's log-probs: dataset, digest of the parameters, lengths and precision."""
    precision = {"compute": policy.config.dtype, "matmul": jax.config.values["jax_default_matmul_precision"]}
    return {
        "dataset": dataset.card.digest,
        "checkpoint": digest,
        "model": {name: value for name, value in to_dict(policy.config).items() if name not in _OF_TRAINING},
        "lengths": [list(bucket) for bucket in buckets],
        "precision": precision | ({"base": base_dtype} if base_dtype else {}),
    }


def store_reference(
    dataset: Dataset,
    policy: Policy,
    params: Parameters,
    mesh: LogicalMesh,
    *,
    batch_size: int,
    buckets: Sequence[Bucket],
    progress: Callable[[int], object] = lambda examples: None,
    base_dtype: str | None = None,
) -> ReferenceLogProbs:
    """The dataset's log-probs under the policy: reads the stored ones, or computes and stores them.

    If an earlier call with the same batch size was killed, its results are kept except those of its last minute.

    Args:
      dataset: the dataset to score.
      policy: the reference policy.
      params: its parameters; they are read only if something has to be scored.
      mesh: the device mesh.
      batch_size: examples that are scored at once, over all devices.
      buckets: the padded shapes (P, R) of batches; the last one has the longest lengths.
      progress: called with the number of examples that were just done.
      base_dtype: dtype of the parameters' projections if they are the base of adapters; see `AdapterConfig`.

    Raises:
      UserError: the stored log-probs belong to another version of the dataset or were changed, or a token id is outside
        the policy's vocabulary.
    """
    identity = reference_identity(dataset, policy, params.digest, buckets, base_dtype)
    if stored := on_every_process(lambda: open_reference(dataset, identity)):
        return stored
    batches = offline_source(
        dataset,
        batch_size=batch_size,
        seed=0,
        prompt_length=buckets[-1][0],
        response_length=buckets[-1][1],
        buckets=buckets[:-1],
        host_rows=functools.partial(host_rows, mesh),
    )
    settings = DatasetConfig(str(dataset.folder), batch_size=batch_size)
    placed = on_devices(batches, settings, mesh, policy.config.vocabulary_size)
    with contextlib.ExitStack() as stack:
        folder = reference_folder(dataset, identity)
        # Another job may be storing them, or have stored them in the meantime.
        on_first_process(lambda: stack.enter_context(locked(folder, wait=math.inf)))
        if stored := on_every_process(lambda: open_reference(dataset, identity)):
            return stored
        writer = on_every_process(
            lambda: ReferenceWriter(dataset, identity, batch_size) if is_first_process() else None
        )
        done = int(first_says(lambda: writer.done if writer else 0))
        progress(min(done * batch_size, len(dataset)))
        steps = range(done, -(-len(dataset) // batch_size))
        for step, log_probs in _scored(placed, make_score(policy, mesh), params.read(), steps):
            if writer:
                writer.write(batches.numbers(step), log_probs)
            progress(min(batch_size, len(dataset) - step * batch_size))
        on_first_process(lambda: writer.close() if writer else None)
    stored = open_reference(dataset, identity)
    assert stored
    return stored


def _scored(
    batches: Callable[[int], PreferenceBatch], score: Callable[..., Any], params: Any, steps: range
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each step with the log-probs [B, K, R] of its whole batch."""
    with Prefetched(batches, 2, last=steps.stop) as ahead:
        for step in steps:
            batch = ahead(step)
            texts = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
            yield step, to_host(score(params, *texts))
