"""The training loop: one for SFT, preference models and every arm, online or offline."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array, Float

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.errors import UserError
from alignment_gap.models import Policy, score
from alignment_gap.sharding import LogicalMesh, batch_sharding, is_first_process, within
from alignment_gap.training.checkpoints import Checkpoints
from alignment_gap.training.state import TrainState
from alignment_gap.training.update import Metrics, UpdateStep

# A source of batches on the device: a function of the step and of the state that is about to be updated.
Source = Callable[[int, TrainState], PreferenceBatch]


def train(
    state: TrainState,
    update_step: UpdateStep,
    source: Source,
    *,
    checkpoint_steps: Sequence[int],
    checkpoints: Checkpoints,
    metrics_path: Path,
    log_every: int = 20,
    on_checkpoint: Callable[[int, list[PreferenceBatch]], None] | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> TrainState:
    """Trains up to the last of `checkpoint_steps`; from the last complete checkpoint where there is one.

    Inside the loop nothing is copied between host and device but what is asked for explicitly.

    Args:
      state: at step 0, of the shapes and shardings that checkpoints have.
      update_step: from `make_update_step`.
      source: the batches.
      checkpoint_steps: increasing; the state is saved after each.
      checkpoints: where to.
      metrics_path: JSON lines, one per `log_every` steps.
      log_every: steps between two lines of metrics.
      on_checkpoint: a recorder: is given the step and the batches since the last checkpoint, before this one is saved.
      progress: is told how many steps are newly done.

    Raises:
      UserError: where loss or gradient are no longer finite; no such state is saved.
    """
    start = checkpoints.steps()[-1] if checkpoints.steps() else 0
    if start:
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = checkpoints.restore(abstract, start)
    if is_first_process():
        truncate_metrics(metrics_path, start)
    progress(start)
    recorded: list[PreferenceBatch] = []
    last_step, clock, clocked = checkpoint_steps[-1], time.perf_counter(), start
    for step in range(start, last_step):
        with jax.transfer_guard("disallow"):
            batch = source(step, state)
            state, metrics = update_step(state, batch)
        if on_checkpoint:
            recorded.append(batch)
        progress(1)
        done = step + 1
        if done % log_every == 0 or done == last_step:
            prompts = float(jax.device_get(metrics["prompts"])) * (done - clocked)
            append_metrics(metrics_path, done, metrics, pairs_per_second=prompts / (time.perf_counter() - clock))
            clock, clocked = time.perf_counter(), done
        if done in checkpoint_steps:
            check_finite(metrics, done)
            if on_checkpoint:
                on_checkpoint(done, recorded)
                recorded = []
            checkpoints.save(state)
    return state


def append_metrics(path: Path, step: int, metrics: Metrics, **more: float) -> None:
    """Adds a line; raises UserError where loss or gradient are not finite."""
    line = {"step": step} | {name: float(value) for name, value in jax.device_get(metrics).items()} | more
    if is_first_process():
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    check_finite(metrics, step)


def check_finite(metrics: Metrics, step: int) -> None:
    """Raises UserError where loss or gradient are not finite: the parameters are lost with either."""
    for name in ("loss", "gradient_norm"):
        value = float(jax.device_get(metrics[name]))
        if not math.isfinite(value):
            raise UserError(
                f"the {name} is {value} at step {step}: lower learning_rate or clip_norm, then start again; "
                "training goes on from the last checkpoint"
            )


def truncate_metrics(path: Path, step: int) -> None:
    """Drops the lines after `step`, which a resumed run writes again; a line that a kill cut short goes with them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            break
    shortened = path.with_suffix(".partial")
    shortened.write_text("".join(kept))
    os.replace(shortened, path)


def make_score(policy: Policy, mesh: LogicalMesh) -> Callable[..., Float[Array, "B K R"]]:
    """A jitted `(params, prompts, prompt_lengths, responses, response_lengths) -> log-probs [B, K, R]` in nats."""
    return jax.jit(within(mesh, lambda *arrays: score(policy, *arrays)), out_shardings=batch_sharding(mesh))


def with_reference(source: Source, score: Callable[..., Float[Array, "B K R"]], reference_params: Any) -> Source:
    """The source with the reference policy's log-probabilities attached where a batch has none.

    Args:
      source: of batches.
      score: from `make_score`, the very function that the policy's evaluation uses.
      reference_params: of the reference policy.
    """

    def attached(step: int, state: TrainState) -> PreferenceBatch:
        batch = source(step, state)
        if batch.reference_log_probs is not None:
            return batch
        return dataclasses.replace(
            batch,
            reference_log_probs=score(
                reference_params, batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths
            ),
        )

    return attached
