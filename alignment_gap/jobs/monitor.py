"""Opens the monitor of a training job, and the held-out examples that it measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath
from alignment_gap.jobs.assembly import Assembly
from alignment_gap.jobs.config import DatasetConfig
from alignment_gap.jobs.reading import Reading, on_devices, open_reading
from alignment_gap.jobs.sources import Inputs
from alignment_gap.training import Monitor, TrainState, Validation, make_validation_step, with_reference
from alignment_gap.training.loop import metrics_line
from alignment_gap.training.tensorboard import check_tensorboard


def open_validation(assembly: Assembly, reading: Reading) -> Reading | None:
    """The held-out examples of a job, if it has any.

    Raises:
      UserError: the loss does not run on them, they are fewer than a batch, or of another vocabulary than the source's;
        or TensorBoard's files are asked for and what writes them is not installed.
    """
    monitor, size = assembly.config.monitor, reading.config.batch_size
    if monitor.tensorboard:
        check_tensorboard()
    if monitor.validation is None:
        return None
    found = open_reading(DatasetConfig(monitor.validation, batch_size=size, order="recorded"), "monitor.validation")
    if len(found.examples) < size:
        raise UserError(f"monitor.validation has {len(found.examples)} examples, under batch_size={size}: give more")
    if found.datasets[0].card.vocabulary_digest != reading.datasets[0].card.vocabulary_digest:
        raise UserError("monitor.validation and source were prepared with two vocabularies: prepare both with one")
    batch = found.batches(assembly.mesh, 0)(0)
    if assembly.needs_reference:
        batch = dataclasses.replace(batch, reference_log_probs=jnp.zeros(batch.responses.shape))
    try:
        assembly.check_loss(batch)
    except UserError as error:
        raise UserError(f"monitor.validation: {error}") from error
    return found


def open_monitor(assembly: Assembly, inputs: Inputs, folder: AnyPath) -> Monitor:
    """The monitor that writes into a job's folder."""
    config, held_out = assembly.config.monitor, inputs.validation
    return Monitor(
        folder,
        tensorboard=config.tensorboard,
        profile=config.profile,
        validation=Validation(config.validate_every, _measure(assembly, inputs, held_out)) if held_out else None,
        hang_after=config.hang_after,
    )


def _measure(assembly: Assembly, inputs: Inputs, reading: Reading) -> Callable[[TrainState], Mapping[str, float]]:
    """Means of the loss and of its diagnostics over the whole batches of held-out examples."""
    mesh, vocabulary_size = assembly.mesh, assembly.policy.config.vocabulary_size
    placed = on_devices(reading.batches(mesh, 0), reading.config, mesh, vocabulary_size)

    def source(number: int, state: TrainState) -> PreferenceBatch:
        return placed(number)

    batches = with_reference(source, assembly.score, inputs.reference) if assembly.needs_reference else source
    count = len(reading.examples) // reading.config.batch_size
    step = make_validation_step(assembly.objective, mesh, assembly.abstract)

    def measure(state: TrainState) -> Mapping[str, float]:
        lines = [metrics_line(step(state.params, batches(number, state))) for number in range(count)]
        return {name: sum(line[name] for line in lines) / count for name in lines[0]}

    return measure
