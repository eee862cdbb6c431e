"""Opens the monitor of a training job, and the held-out examples of its validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath
from alignment_gap.jobs.assembly import Assembly
from alignment_gap.jobs.config import DatasetConfig
from alignment_gap.jobs.reading import Reading, has_rewards, on_devices, open_reading
from alignment_gap.jobs.served import check_scores, has_reference, reads_mismatched
from alignment_gap.jobs.sources import Inputs, frozen_of, reference_of
from alignment_gap.sharding.chips import peak_flops
from alignment_gap.training import (
    Monitor,
    Source,
    TrainState,
    Validation,
    make_schedule,
    with_mismatched,
    with_reference,
)
from alignment_gap.training.loop import metrics_line
from alignment_gap.training.tensorboard import check_tensorboard


def open_validation(assembly: Assembly, reading: Reading) -> Reading | None:
    """The held-out examples of a job; None if it has none.

    Raises:
      UserError: the loss does not run on the examples or their kind of scores; they are fewer than a batch; their
        vocabulary is not the source's; they do not give the metric that ranks checkpoints; or `tensorboard` is set, but
        the package that writes its files is not installed.
    """
    monitor, size = assembly.config.monitor, reading.config.batch_size
    if monitor.tensorboard:
        check_tensorboard()
    if monitor.validation is None:
        return None
    found = open_reading(DatasetConfig(monitor.validation, batch_size=size, order="recorded"), "monitor.validation")
    if len(found.examples) < size:
        raise UserError(f"monitor.validation has {len(found.examples)} examples, below batch_size={size}: give more")
    if found.datasets[0].card.vocabulary_digest != reading.datasets[0].card.vocabulary_digest:
        raise UserError("monitor.validation and source have different vocabularies: prepare both with the same one")
    if assembly.is_policy:
        check_scores(assembly.config, assembly.loss, [each.card for each in found.datasets], "monitor.validation")
    batch = found.batches(assembly.mesh, 0)(0)
    if _has_reference(assembly):
        batch = dataclasses.replace(batch, reference_log_probs=jnp.zeros(batch.responses.shape))
    if assembly.is_policy and reads_mismatched(assembly.loss):
        batch = dataclasses.replace(batch, mismatched=batch)
    try:
        names = assembly.check_loss(batch, rewards=has_rewards(found))
    except UserError as error:
        raise UserError(f"monitor.validation: {error}") from error
    keep = assembly.config.keep
    if keep.best is not None and keep.metric not in names:
        raise UserError(
            f"keep.metric is {keep.metric!r}, but the validation of this job has no such metric: set it to 'loss'"
        )
    return found


def _has_reference(assembly: Assembly) -> bool:
    """Whether the job's own reference scores the held-out examples."""
    return assembly.is_policy and has_reference(assembly.config, assembly.loss)


def open_monitor(assembly: Assembly, inputs: Inputs, folder: AnyPath) -> Monitor:
    """The monitor of a job; it writes to the job's folder."""
    config, held_out = assembly.config.monitor, inputs.validation
    return Monitor(
        folder,
        tensorboard=config.tensorboard,
        profile=config.profile,
        validation=_validation(assembly, inputs, held_out) if held_out else None,
        hang_after=config.hang_after,
        least_seconds=_least_seconds(assembly),
        learning_rate=make_schedule(assembly.config.optimizer, assembly.config.steps),
        counts=inputs.judge.counts if inputs.judge else dict,
    )


def _least_seconds(assembly: Assembly) -> Callable[[PreferenceBatch], float] | None:
    """Seconds that a batch's update would take at the mesh's peak FLOPs; None if the table of chips lacks a device."""
    peak = peak_flops(assembly.mesh.devices.devices.flat)
    if peak is None:
        return None
    known: dict[tuple[tuple[int, ...], ...], float] = {}

    def seconds(batch: PreferenceBatch) -> float:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in known:
            known[shapes] = assembly.update_flops(batch)[1] / peak
        return known[shapes]

    return seconds


def _validation(assembly: Assembly, inputs: Inputs, held_out: Reading) -> Validation:
    config = assembly.config
    measure = _measure(assembly, inputs, held_out)
    return Validation(config.monitor.validate_every, measure, at_checkpoints=config.keep.best is not None)


def _measure(assembly: Assembly, inputs: Inputs, reading: Reading) -> Callable[[TrainState], Mapping[str, float]]:
    """A function for the means of the loss and its diagnostics over the whole batches of held-out examples."""
    mesh, vocabulary_size = assembly.mesh, assembly.policy.config.vocabulary_size
    placed = on_devices(reading.batches(mesh, 0), reading.config, mesh, vocabulary_size)

    def source(number: int, state: TrainState) -> PreferenceBatch:
        return placed(number)

    def without_reference(number: int, state: TrainState) -> PreferenceBatch:
        return dataclasses.replace(placed(number), reference_log_probs=None)

    # The held-out examples may be a record, with the log-probs of another reference.
    batches: Source = without_reference if _has_reference(assembly) else source
    if assembly.is_policy and reads_mismatched(assembly.loss):
        batches = with_mismatched(batches, mesh)
    if _has_reference(assembly):
        batches = with_reference(batches, assembly.score, reference_of(assembly, inputs))
    count = len(reading.examples) // reading.config.batch_size
    step, frozen = assembly.validation_step(rewards=has_rewards(reading)), frozen_of(assembly, inputs)

    def measure(state: TrainState) -> Mapping[str, float]:
        lines = [metrics_line(step(state.params, batches(number, state), *frozen)) for number in range(count)]
        return {name: sum(line[name] for line in lines) / count for name in lines[0]}

    return measure
