"""Preference models as judges on the devices: pairwise or Bradley-Terry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from alignment_gap.checkpoints import Network, check_vocabulary, find_checkpoint, known_network
from alignment_gap.checkpoints.digest import params_digest
from alignment_gap.data.records import Dataset
from alignment_gap.errors import UserError
from alignment_gap.folders import at
from alignment_gap.judges.contract import FORMS, PROBABILITIES, REWARDS, Judge, JudgeConfig
from alignment_gap.models import PreferenceModel
from alignment_gap.sharding import LogicalMesh, batch_sharding, on_every_process, within
from alignment_gap.training import Bases, load_preference_model


def accepts(name: str) -> bool:
    """Whether this module opens the judge of this name; it takes any folder."""
    return True


def own_labels(name: str) -> str:
    """The labels that this judge gives by itself: rewards if it has them, else hard preferences."""
    network = on_every_process(lambda: judge_network(JudgeConfig(name)))
    return REWARDS if network.kind == "bradley_terry" else "hard"


def check(name: str) -> None:
    """Raises UserError if the folder holds no preference model."""
    judge_network(JudgeConfig(name))


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh, bases: Bases) -> Judge:
    """Opens the judge in a run's folder.

    Raises:
      UserError: the folder holds no preference model, or one with another vocabulary; or the config asks a pairwise
        model for rewards.
    """
    folder = str(config.judge)
    network = on_every_process(lambda: judge_network(config))
    check_vocabulary(network, dataset.card.vocabulary_digest, folder, str(dataset.folder))
    model, params = load_preference_model(folder, mesh, config.step, bases)
    scores = functools.partial(make_scores(model, config.labels, mesh), params)
    kind = REWARDS if config.labels == REWARDS else PROBABILITIES
    facts, size = {"judge": folder, "judge.digest": params_digest(params)}, network.model.vocabulary_size
    return Judge(scores, kind, facts, vocabulary_size=size)


def judge_network(config: JudgeConfig) -> Network:
    """The network in a judge's folder, from its metadata alone; raises UserError if it cannot be this judge."""
    folder = str(config.judge)
    if not at(folder).is_dir():
        raise UserError(f"the judge {folder} is not there: give {FORMS}")
    network = known_network(find_checkpoint(at(folder), config.step))
    if network.kind == "policy":
        raise UserError(f"the judge {folder} is a policy: give the folder of a preference model")
    if config.labels == REWARDS and network.kind != "bradley_terry":
        raise UserError(f"labels is 'rewards', but {folder} compares pairs: choose hard or soft")
    return network


@functools.cache
def make_scores(model: PreferenceModel, labels: str, mesh: LogicalMesh) -> Callable[..., Float[Array, "B K"]]:
    """A jitted `(params, prompts, prompt_lengths, responses, response_lengths) -> scores [B, K]`."""

    def scores(*batch: Any) -> Float[Array, "B K"]:
        return model.scores(*batch, labels=labels)

    return jax.jit(within(mesh, scores), out_shardings=batch_sharding(mesh))
