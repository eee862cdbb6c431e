"""The guard against updates that would ruin the parameters: the compiled step skips them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from alignment_gap import checks
from alignment_gap.errors import UserError

# After the guard stopped a job, the job may continue with other values of these settings.
REMEDIES = ("optimizer.learning_rate", "optimizer.clip_norm", "guard.spike")
# For the running mean of gradient norms: the weight of a new norm, and the number of norms before it is used.
_SHARE, _LEARNED = 0.02, 50


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which updates are skipped. An update whose loss or gradient is not finite is always skipped.

    Attributes:
      stop_after: the job stops after this many skipped updates in a row; checked at every line of metrics.
      spike: also skips an update whose gradient norm is more than this many times the running mean; None for no limit.
        Norms of 0, such as those of batches whose scores are all equal, are left out of the mean.
    """

    stop_after: int = 10
    spike: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "stop_after")
        checks.above(self, 1, "spike")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Skipped:
    """A run's memory of its updates, as part of its state.

    Attributes:
      total: number of skipped updates.
      in_a_row: number of skipped updates since the last update that was made.
      norm: running mean of the gradient norms that are above 0, over the updates that were made.
      norms: number of the norms in this mean; None in a checkpoint of an earlier version, which did not count them.
    """

    total: Int[Array, ""]
    in_a_row: Int[Array, ""]
    norm: Float[Array, ""]
    norms: Int[Array, ""] | None = None


def nothing_skipped() -> Skipped:
    """The memory at the start of a run."""
    zero = functools.partial(jnp.zeros, ())
    return Skipped(zero(jnp.int32), zero(jnp.int32), zero(), zero(jnp.int32))


def guard(
    config: GuardConfig,
    skipped: Skipped,
    step: Int[Array, ""],
    loss: Float[Array, ""],
    gradient_norm: Float[Array, ""],
) -> tuple[Bool[Array, ""], Skipped]:
    """Whether to make the update of a step, and the memory after it."""
    norms = step - skipped.total if skipped.norms is None else skipped.norms
    is_good = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    if config.spike is not None:
        is_unknown = (norms < _LEARNED) | (skipped.norm == 0)
        is_good &= is_unknown | (gradient_norm <= config.spike * skipped.norm)
    # Zeros would pull the mean down until the limit stops every update that learns something.
    counts = is_good & (gradient_norm > 0)
    # At first a plain mean, so that the initial zero has no weight.
    share = jnp.maximum(_SHARE, 1 / (norms + 1).astype(jnp.float32))
    norm = jnp.where(counts, (1 - share) * skipped.norm + share * gradient_norm, skipped.norm)
    one = (~is_good).astype(jnp.int32)
    in_a_row = jnp.where(is_good, 0, skipped.in_a_row + 1)
    return is_good, Skipped(skipped.total + one, in_a_row, norm, norms + counts.astype(jnp.int32))


def check_progress(config: GuardConfig, in_a_row: int, step: int, loss: float, gradient_norm: float) -> None:
    """Raises UserError if too many updates in a row were skipped up to `step`."""
    if in_a_row < config.stop_after:
        return
    met = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {gradient_norm:.3g}"
    remedy = "look at the loss and its data" if in_a_row == step else "lower learning_rate or clip_norm"
    raise UserError(
        f"the last {in_a_row} updates up to step {step} were skipped, {met}: {remedy} and run the command again; it "
        "continues from the last checkpoint",
        may_change=REMEDIES,
    )


def tell_skipped(skipped: Skipped, steps: int, say: Callable[[str], None]) -> None:
    """Says at the end of a run how many of its updates were skipped, if any were."""
    if total := int(jax.device_get(skipped.total)):
        say(
            f"{total:,} of {steps:,} updates were skipped, because the loss or the gradient was not finite or above "
            "guard.spike: see `skipped` in the metrics"
        )
