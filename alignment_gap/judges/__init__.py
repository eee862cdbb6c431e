"""Judges decide which response is better. They share one contract; each kind is a module."""

from __future__ import annotations

from types import MappingProxyType, ModuleType

from alignment_gap.data.records import Dataset
from alignment_gap.errors import UserError
from alignment_gap.judges import function, language_model, preference_model, rubric
from alignment_gap.judges.contract import FORMS, LABELS, PROBABILITIES, REWARDS, Judge, JudgeConfig
from alignment_gap.sharding import LogicalMesh
from alignment_gap.training import Bases

# The first kind that accepts a judge's name opens it.
_KINDS = (rubric, function, language_model, preference_model)


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh, bases: Bases = MappingProxyType({})) -> Judge:
    """Opens the judge of a config, for responses to the prompts of a dataset; raises UserError if it is not usable.

    A preference model of adapters takes its base from `bases` if the base is in memory already.
    """
    name = config.judge
    if name is None:
        raise UserError(f"no judge is set: give {FORMS}")
    kind = _kind(name)
    if kind is preference_model:
        return preference_model.open_judge(config, dataset, mesh, bases)
    return kind.open_judge(config, dataset, mesh)


def is_model(name: str) -> bool:
    """Whether a judge is a network on the devices; other judges run on the host."""
    return _kind(name) is preference_model


def by_itself(name: str) -> JudgeConfig:
    """The judge of a name with its own labels: rewards if it has them, else hard preferences."""
    return JudgeConfig(name, labels=_kind(name).own_labels(name))


def check_judge(name: str) -> None:
    """Raises UserError if there is no judge of this name; asks the judge nothing."""
    _kind(name).check(name)


def _kind(name: str) -> ModuleType:
    return next(kind for kind in _KINDS if kind.accepts(name))


__all__ = [
    "LABELS",
    "PROBABILITIES",
    "REWARDS",
    "Judge",
    "JudgeConfig",
    "by_itself",
    "check_judge",
    "is_model",
    "open_judge",
]
