"""Reward models for other libraries: a Bradley-Terry model that was trained here, with a linear head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from alignment_gap.checkpoints.network import Network
from alignment_gap.checkpoints.tensors import Tensor
from alignment_gap.models import DecoderConfig, RewardHead
from alignment_gap.models.preference import Markers
from alignment_gap.models.reward_head import without_output

_OUTPUT = "output_embedder.embedding"


def has_linear_reward(network: Network) -> bool:
    """Whether a linear head can give the rewards: a Bradley-Terry model over a decoder without a cap on its logits."""
    model = network.model
    return network.kind == "bradley_terry" and isinstance(model, DecoderConfig) and model.logits_soft_cap is None


def with_head(network: Network, tensors: Mapping[str, Tensor]) -> tuple[Network, dict[str, Tensor]]:
    """The same reward model with a head in place of the output embedding, and its tensors.

    The reward is the difference of two logits, e1 . h - e2 . h, so the head is e1 - e2. A factor on the logits is not
    part of it: no model of transformers has one.
    """
    if network.head is not None:
        return network, dict(tensors)
    markers = Markers(*network.markers)
    table = tensors.get(_OUTPUT) or tensors["token_embedder.embedding"]

    def read(_: int | None) -> np.ndarray:
        rows = table.read(None)
        return (rows[markers.first_better] - rows[markers.second_better])[:, None]

    kept = {name: tensor for name, tensor in tensors.items() if name != _OUTPUT}
    head = RewardHead(before=markers.first, after=markers.question)
    network = dataclasses.replace(network, model=without_output(network.model), markers=(), head=head)
    return network, kept | {"score.kernel": Tensor((table.shape[1], 1), table.dtype, read)}
