"""Optimizers by name, all from optax."""

from __future__ import annotations

import dataclasses

import optax

from alignment_gap.errors import UserError

NAMES = ("adafactor", "adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of an optimizer.

    Attributes:
      name: "adafactor" (decay 0.8), "adamw" (0.9, 0.999) or "sgd".
      learning_rate: after warm-up, constant.
      warmup_steps: linear from 0.
      clip_norm: global gradient norm above which gradients are scaled down; 0 means never.
      weight_decay: decoupled, per step, times the learning rate.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    clip_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raises UserError where a setting is unknown or out of its range."""
        if self.name not in NAMES:
            raise UserError(f"optimizer {self.name!r} is unknown: choose one of {', '.join(NAMES)}")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate is {self.learning_rate}: it must be above 0")
        for name in ("warmup_steps", "clip_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be 0 (none) or more")


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optax transformation of a config."""
    rate = optax.warmup_constant_schedule(0.0, config.learning_rate, config.warmup_steps)
    if config.warmup_steps == 0:
        rate = optax.constant_schedule(config.learning_rate)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    if config.name == "adafactor":
        step = optax.adafactor(rate, decay_rate=0.8)
        if config.weight_decay:  # Adafactor's own would not be times the learning rate.
            step = optax.chain(step, optax.add_decayed_weights(lambda count: -config.weight_decay * rate(count)))
    elif config.name == "adamw":
        step = optax.adamw(rate, weight_decay=config.weight_decay)
    else:
        step = optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate))
    return optax.chain(clip, step)
