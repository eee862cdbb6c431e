"""Optimizers and learning-rate schedules by name, all from optax."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from optax import contrib

from alignment_gap import checks
from alignment_gap.errors import UserError
from alignment_gap.models.adapters import split_axes
from alignment_gap.sharding import of_axes

NAMES = ("adafactor", "adamw", "lion", "muon", "sgd")
_WITH_MOMENT = ("adamw", "lion", "muon")
SCHEDULES = ("constant", "linear", "cosine", "inverse_square_root", "warmup_stable_decay")
_TO_THE_END = ("linear", "cosine", "warmup_stable_decay")
DECAYED = ALL, MATRICES = ("all", "matrices")
DTYPES = ("float32", "bfloat16")

# Logical names of a parameter's axes.
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of an optimizer and of its learning rate.

    Attributes:
      name: "adamw" (0.9, 0.999), "adafactor" (decay 0.8; 1804.04235), "lion" (0.9, 0.99; 2302.06675), "muon" (0.95) or
        "sgd". Muon takes the matrices inside of layers, with updates as large as AdamW's (2502.16982), and AdamW with
        Nesterov's momentum all other parameters.
      learning_rate: after warm-up, the highest.
      warmup_steps: linear from 0.
      schedule: after warm-up "constant"; "linear" or "cosine" down to the last step; "inverse_square_root" of the step,
        from the end of warm-up; or "warmup_stable_decay", constant and then linear (2404.06395).
      final_rate: what is left of the learning rate at the last step, as a share.
      decay_share: share of all steps in which "warmup_stable_decay" goes down.
      clip_norm: global gradient norm above which gradients are scaled down; None means never.
      weight_decay: decoupled, per step, times the learning rate.
      decayed: "all" parameters, or the "matrices" alone: no scales of norms, no biases.
      moment_dtype: of the first moment of adamw, lion and muon: "float32", or "bfloat16" for half of its memory.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "constant"
    final_rate: float = 0.0
    decay_share: float = 0.2
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0
    decayed: str = ALL
    moment_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises UserError if a setting is unknown or out of its range."""
        checks.one_of(self, NAMES, "name")
        checks.one_of(self, SCHEDULES, "schedule")
        checks.one_of(self, DECAYED, "decayed")
        checks.one_of(self, DTYPES, "moment_dtype")
        checks.above(self, 0, "learning_rate", "clip_norm", "decay_share")
        checks.at_least(self, 0, "warmup_steps", "weight_decay")
        checks.within(self, 0, 1, "final_rate", "decay_share")
        if self.moment_dtype != "float32" and self.name not in _WITH_MOMENT:
            raise UserError(
                f"moment_dtype is {self.moment_dtype!r}, but {self.name} keeps no first moment: leave it out"
            )

    @property
    def ends(self) -> bool:
        """Whether the learning rate depends on the number of steps of the whole run."""
        return self.schedule in _TO_THE_END


def make_schedule(config: OptimizerConfig, steps: int | None = None) -> optax.Schedule:
    """The learning rate by the number of updates that were done before.

    Args:
      config: the settings.
      steps: of the whole run, for a schedule that `ends`.

    Raises:
      UserError: the run ends before the learning rate can fall.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        return optax.warmup_constant_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    if config.schedule == "inverse_square_root":
        flat = max(warmup, 1)
        after: optax.Schedule = lambda count: peak * jnp.sqrt(flat / (jnp.maximum(count, 0) + flat))  # noqa: E731
    else:
        left = (steps or 0) - warmup
        if left < 1:
            raise UserError(
                f"optimizer.warmup_steps is {warmup}, but the run has {steps} steps: schedule={config.schedule} needs "
                "some after warm-up, so lower it"
            )
        end = peak * config.final_rate
        if config.schedule == "linear":
            after = optax.linear_schedule(peak, end, left)
        elif config.schedule == "cosine":
            after = optax.cosine_decay_schedule(peak, left, config.final_rate)
        else:
            falls = min(left, max(1, round(config.decay_share * (steps or 0))))
            fall = optax.linear_schedule(peak, end, falls)
            after = optax.join_schedules([optax.constant_schedule(peak), fall], [left - falls])
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(
    config: OptimizerConfig, *, steps: int | None = None, parameters: Any = None
) -> optax.GradientTransformation:
    """The optax transformation of a config.

    Args:
      config: the settings.
      steps: of the whole run, for a schedule that `ends`.
      parameters: (abstract) ones, in boxes with the logical names of their axes; for muon, and where the matrices alone
        are decayed.
    """
    rate = make_schedule(config, steps)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else optax.identity()
    decay, moment = config.weight_decay, jnp.dtype(config.moment_dtype)
    mask = of_axes(_is_matrix, parameters) if config.decayed == MATRICES else None
    if config.name == "adamw":
        step = optax.adamw(rate, weight_decay=decay, mask=mask, mu_dtype=moment)
    elif config.name == "lion":
        step = optax.lion(rate, weight_decay=decay, mask=mask, mu_dtype=moment)
    elif config.name == "sgd":
        step = optax.chain(optax.add_decayed_weights(decay, mask), optax.sgd(rate))
    else:
        step = optax.adafactor(rate, decay_rate=0.8) if config.name == "adafactor" else _muon(rate, parameters, moment)
        if decay:  # Adafactor's own would not be times the learning rate, and Muon's leaves out what AdamW takes.
            step = optax.chain(step, optax.add_decayed_weights(lambda count: -decay * rate(count), mask))
    return optax.chain(clip, step)


def _muon(rate: optax.Schedule, parameters: Any, moment: Any) -> optax.GradientTransformation:
    numbers = of_axes(_as_matrix, parameters)
    return contrib.muon(
        rate, muon_weight_dimension_numbers=numbers, consistent_rms=0.2, adam_b1=0.9, adam_b2=0.999, mu_dtype=moment
    )


def _is_matrix(names: Axes) -> bool:
    """Whether a parameter maps from the width of the network or to it, or is a part of an adapter that does."""
    return bool({"embed", "rank"} & set(names)) and len(set(names) - {"layers"}) > 1


def _as_matrix(names: Axes) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a kernel are the rows and which the columns of its matrix; None for what Muon leaves to AdamW."""
    if not _is_matrix(names) or "vocab" in names:
        return None
    inside = [axis for axis, name in enumerate(names) if name != "layers"]
    return contrib.MuonDimensionNumbers(*split_axes([names[axis] for axis in inside], inside))
