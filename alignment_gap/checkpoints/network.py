"""The record in a checkpoint of the network whose parameters it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from alignment_gap.configuration import from_dict, to_dict
from alignment_gap.errors import UserError
from alignment_gap.models import (
    AdapterConfig,
    Adapters,
    ModelConfig,
    Policy,
    PreferenceModel,
    RewardHead,
    T5Config,
    make_policy,
)
from alignment_gap.models.preference import Markers
from alignment_gap.models.reward_head import make_init

# Fields of a model's config that change how it runs, but neither its function nor its parameters.
RUN_TIME = ("attention", "dtype", "remat", "scan_unroll")
# Fields in which checkpoints of the first version have "" or 0 for None.
_UNSET = (
    "vocabulary",
    "vocabulary_digest",
    "logits_soft_cap",
    "attention_soft_cap",
    "query_pre_attention_scalar",
    "rope_local_base",
    "window",
)


@dataclasses.dataclass(frozen=True)
class Network:
    """The network that a checkpoint holds.

    Attributes:
      kind: "policy", or the kind of a preference model: "pairwise" or "bradley_terry".
      model: config of the policy, or of the policy inside a preference model.
      markers: a preference model's reserved token ids, in the order of `Markers`; empty for a policy and with a head.
      vocabulary: path of its vocabulary; None if unknown.
      vocabulary_digest: digest of the vocabulary; None if unknown.
      end_prompts: whether its training prompts end with the vocabulary's end id; None if unknown.
      template: the template that its training prompts were prepared with; None if unknown.
      head: how a reward model with a head of its own reads a response; None for all other networks.
      adapter: settings of the adapters, if the checkpoint holds adapters alone; else None.
      base: the checkpoint with the adapters' base.
      base_digest: digest of the base's parameters.
    """

    kind: str = "policy"
    model: ModelConfig = T5Config()
    markers: tuple[int, ...] = ()
    vocabulary: str | None = None
    vocabulary_digest: str | None = None
    adapter: AdapterConfig | None = None
    base: str | None = None
    base_digest: str | None = None
    end_prompts: bool | None = None
    template: str | None = None
    head: RewardHead | None = None

    def policy(self) -> Policy:
        """The policy, or the policy inside a preference model."""
        return make_policy(self.model)

    @property
    def adapters(self) -> Adapters | None:
        """The adapters that the checkpoint holds; None if it holds whole parameters."""
        return None if self.adapter is None else Adapters(self.policy(), self.adapter, self.head)

    @property
    def init(self) -> Callable[[Any], Any]:
        """The function that makes fresh parameters, in boxes, of the kind that the checkpoint holds, from a key."""
        return self.whole_init if self.adapters is None else self.adapters.init

    @property
    def whole_init(self) -> Callable[[Any], Any]:
        """The same for whole parameters, which adapters are added to."""
        return self.policy().init if self.head is None else make_init(self.policy(), self.head)

    def preference_model(self) -> PreferenceModel:
        """The preference model; raises UserError if the network is a policy."""
        if self.kind == "policy":
            raise UserError("the network is a policy, no preference model: give the folder of a preference model")
        markers = Markers(*self.markers) if self.head is None else None
        return PreferenceModel(self.policy(), markers, self.kind, self.head)


def to_json(network: Network) -> dict[str, Any]:
    """The network as a checkpoint stores it."""
    return to_dict(network) | {"markers": list(network.markers)}


def from_json(values: Mapping[str, Any]) -> Network:
    """The network from its stored form; raises UserError for a field that this version does not know."""
    return from_dict(Network, {**_with_none(values), "model": _with_none(values["model"])}, path="network")


def _with_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if name in _UNSET and not value else value for name, value in values.items()}


def check_vocabulary(network: Network, digest: str | None, checkpoint: str, dataset: str) -> None:
    """Raises UserError if a checkpoint and a dataset are known to have different vocabularies.

    Args:
      network: network of the checkpoint.
      digest: digest of the dataset's vocabulary.
      checkpoint, dataset: their paths, for the error.
    """
    if network.vocabulary_digest and digest and network.vocabulary_digest != digest:
        raise UserError(
            f"{dataset} was prepared with the vocabulary {digest[:12]}, {checkpoint} was trained with "
            f"{network.vocabulary_digest[:12]}: prepare the dataset with the checkpoint's vocabulary"
        )


def check_policy(network: Network, checkpoint: str) -> None:
    """Raises UserError if a checkpoint cannot be a policy, because a reward head replaces its output embedding."""
    if network.head is not None:
        raise UserError(
            f"{checkpoint} is a reward model, whose head replaces the output embedding: give a policy, or set "
            "KIND='bradley_terry' to train the reward model"
        )


def run_like(model: ModelConfig, other: ModelConfig) -> ModelConfig:
    """The model with the fields `RUN_TIME` of another."""
    return dataclasses.replace(model, **{name: getattr(other, name) for name in RUN_TIME})


_OWN_MODEL = "to take the checkpoint's own, leave MODEL out or set it to None, in gin by --gin.MODEL=None"


def agreed_model(asked: ModelConfig | None, network: Network, where: str, remedy: str = _OWN_MODEL) -> ModelConfig:
    """The model to train from a checkpoint: the requested model if it is the same network, or the checkpoint's own.

    Args:
      asked: the requested model, which may differ in the fields `RUN_TIME`; None for the checkpoint's own.
      network: network of the checkpoint.
      where: path of the checkpoint, for the error.
      remedy: what to do if the networks differ.

    Raises:
      UserError: the networks differ; the message names the fields.
    """
    if asked is None:
        return network.model
    ours, theirs = to_dict(asked), to_dict(network.model)
    differences = [
        f"{name} is {ours.get(name, 'absent')}, but {theirs.get(name, 'absent')} in the checkpoint"
        for name in dict.fromkeys((*ours, *theirs))
        if name not in RUN_TIME and ours.get(name) != theirs.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:3]) + (f"; {len(differences) - 3} more" if len(differences) > 3 else "")
        raise UserError(f"{where} is of another model ({shown}): {remedy}")
    return asked
