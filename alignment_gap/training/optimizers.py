"""Optimizers by name, all from optax."""

from __future__ import annotations

import dataclasses

import optax

from alignment_gap import checks

NAMES = ("adafactor", "adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of an optimizer.

    Attributes:
      name: "adafactor" (decay 0.8), "adamw" (0.9, 0.999) or "sgd".
      learning_rate: after warm-up, constant.
      warmup_steps: linear from 0.
      clip_norm: global gradient norm above which gradients are scaled down; None means never.
      weight_decay: decoupled, per step, times the learning rate.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    clip_norm: float | None = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError where a setting is unknown or out of its range."""
        checks.one_of(self, NAMES, "name")
        checks.above(self, 0, "learning_rate", "clip_norm")
        checks.at_least(self, 0, "warmup_steps", "weight_decay")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax transformation of a config."""
    rate = optax.warmup_constant_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.warmup_steps == 0:
        rate = optax.constant_schedule(config.learning_rate)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else optax.identity()
    if config.name == "adafactor":
        step = optax.adafactor(rate, decay_rate=0.8)
        if config.weight_decay:  # Adafactor's own would not be times the learning rate.
            step = optax.chain(step, optax.add_decayed_weights(lambda count: -config.weight_decay * rate(count)))
    elif config.name == "adamw":
        step = optax.adamw(rate, weight_decay=config.weight_decay)
    else:
        step = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate))
    return optax.chain(clip, step)
