"""The parts that all training shares: state, optimizers, update step, sources, checkpoints and loop."""

from alignment_gap.training.checkpoints import (
    Bases,
    Checkpoints,
    KeepConfig,
    base_key,
    load_base,
    load_params,
    load_plain,
    load_policy,
    load_preference_model,
)
from alignment_gap.training.guard import GuardConfig
from alignment_gap.training.loop import train
from alignment_gap.training.monitor import Monitor, Times, Validation
from alignment_gap.training.optimizers import OptimizerConfig, make_optimizer, make_schedule
from alignment_gap.training.sources import Source, make_score, with_fresh, with_mismatched, with_reference
from alignment_gap.training.state import (
    TrainState,
    abstract_base,
    abstract_params,
    abstract_state,
    create_state,
    make_moving,
    make_refresh,
    state_from_params,
    with_copy,
)
from alignment_gap.training.update import (
    Objective,
    UpdateStep,
    adapter_objective,
    apply_loss,
    loss_inputs,
    make_update_step,
    make_validation_step,
    policy_objective,
    preference_objective,
)

__all__ = [
    "Bases",
    "Checkpoints",
    "GuardConfig",
    "KeepConfig",
    "Monitor",
    "Objective",
    "OptimizerConfig",
    "Source",
    "Times",
    "TrainState",
    "UpdateStep",
    "Validation",
    "abstract_base",
    "abstract_params",
    "abstract_state",
    "adapter_objective",
    "apply_loss",
    "base_key",
    "create_state",
    "load_base",
    "load_params",
    "load_plain",
    "load_policy",
    "load_preference_model",
    "loss_inputs",
    "make_moving",
    "make_optimizer",
    "make_refresh",
    "make_schedule",
    "make_score",
    "make_update_step",
    "make_validation_step",
    "policy_objective",
    "preference_objective",
    "state_from_params",
    "train",
    "with_copy",
    "with_fresh",
    "with_mismatched",
    "with_reference",
]
