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
WITH_MOMENT = ("adamw", "lion", "muon")
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
        "sgd". Muon updates the matrices inside layers, with updates as large as AdamW's (2502.16982); AdamW with
        Nesterov momentum updates all other parameters.
      learning_rate: learning rate after warm-up, the maximum.
      warmup_steps: steps of linear warm-up from 0.
      schedule: learning rate after warm-up: "constant"; "linear" or "cosine" decay down to the last step;
        "inverse_square_root" of the step; or "warmup_stable_decay", first constant, then linear decay (2404.06395).
      final_rate: learning rate that a decay reaches after the last step, as a fraction of the maximum. The last update
        itself is one step before the end of the decay.
      decay_share: fraction of all steps in which "warmup_stable_decay" decays.
      clip_norm: gradients with a larger global norm are scaled down to this norm; None means never.
      weight_decay: decoupled weight decay; per step it is multiplied by the learning rate.
      decayed: which parameters decay: "all", or only "matrices", without norm scales and biases.
      moment_dtype: dtype of the first moment of adamw, lion and muon: "float32", or "bfloat16" for half the memory.
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
        """Raises UserError if a setting is unknown or out of range."""
        checks.one_of(self, NAMES, "name")
        checks.one_of(self, SCHEDULES, "schedule")
        checks.one_of(self, DECAYED, "decayed")
        checks.one_of(self, DTYPES, "moment_dtype")
        checks.above(self, 0, "learning_rate", "clip_norm", "decay_share")
        checks.at_least(self, 0, "warmup_steps", "weight_decay")
        checks.within(self, 0, 1, "final_rate", "decay_share")
        if self.moment_dtype != "float32" and self.name not in WITH_MOMENT:
            raise UserError(
                f"moment_dtype is {self.moment_dtype!r}, but {self.name} keeps no first moment: leave it out"
            )

    @property
    def ends(self) -> bool:
        """Whether the learning rate depends on the number of steps of the whole run."""
        return self.schedule in _TO_THE_END


def make_schedule(config: OptimizerConfig, steps: int | None = None) -> optax.Schedule:
    """The learning rate as a function of the number of earlier updates.

    Args:
      config: the settings.
      steps: number of steps of the whole run, for a schedule that `ends`.

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
                "steps after warm-up, so lower it"
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
      steps: number of steps of the whole run, for a schedule that `ends`.
      parameters: the (abstract) parameters, in boxes with the logical names of their axes; needed for muon, and if only
        matrices decay.
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
        if decay:  # Adafactor's own decay ignores the learning rate; Muon's omits the parameters of its AdamW.
            step = optax.chain(step, optax.add_decayed_weights(lambda count: -decay * rate(count), mask))
    return optax.chain(clip, step)


def _muon(rate: optax.Schedule, parameters: Any, moment: Any) -> optax.GradientTransformation:
    numbers = of_axes(_as_matrix, parameters)
    return contrib.muon(
        rate, muon_weight_dimension_numbers=numbers, consistent_rms=0.2, adam_b1=0.9, adam_b2=0.999, mu_dtype=moment
    )


def _is_matrix(names: Axes) -> bool:
    """Whether a parameter is a matrix from or to the network's width, or a part of an adapter of such a matrix."""
    return bool({"embed", "rank"} & set(names)) and len(set(names) - {"layers"}) > 1


def _as_matrix(names: Axes) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a kernel are its matrix's rows and columns; None for parameters that Muon leaves to AdamW."""
    if not _is_matrix(names) or "vocab" in names:
        return None
    inside = [axis for axis, name in enumerate(names) if name != "layers"]
    return contrib.MuonDimensionNumbers(*split_axes([names[axis] for axis in inside], inside))
