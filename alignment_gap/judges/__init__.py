"""Judges: who says which response is better. One contract, a module for each kind."""

from __future__ import annotations

from types import MappingProxyType

from alignment_gap.data.records import Dataset
from alignment_gap.errors import UserError
from alignment_gap.judges import function, preference_model, rubric
from alignment_gap.judges.contract import LABELS, PROBABILITIES, REWARDS, Judge, JudgeConfig
from alignment_gap.sharding import LogicalMesh
from alignment_gap.training import Bases

# The first that accepts a judge's name opens it.
_KINDS = (rubric, function, preference_model)


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh, bases: Bases = MappingProxyType({})) -> Judge:
    """The judge of a config, for responses to the prompts of a dataset; raises UserError where it cannot be asked.

    A preference model of adapters takes its base from `bases`, where it is there already.
    """
    name = config.judge
    if name is None:
        raise UserError("there is no judge: give the folder of a preference model, rubric, or module:function")
    kind = next(kind for kind in _KINDS if kind.accepts(name))
    if kind is preference_model:
        return preference_model.open_judge(config, dataset, mesh, bases)
    return kind.open_judge(config, dataset, mesh)


def is_model(name: str) -> bool:
    """Whether a judge is a network on the devices, and not asked on the host."""
    return next(kind for kind in _KINDS if kind.accepts(name)) is preference_model


def by_itself(name: str) -> JudgeConfig:
    """The judge of a name with what it gives by itself: rewards where it has them, else hard preferences."""
    kind = next(kind for kind in _KINDS if kind.accepts(name))
    return JudgeConfig(name, labels=kind.own_labels(name))


__all__ = ["LABELS", "PROBABILITIES", "REWARDS", "Judge", "JudgeConfig", "by_itself", "is_model", "open_judge"]
