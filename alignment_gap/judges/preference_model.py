"""A preference model as a judge, pairwise or Bradley-Terry, on the devices."""

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
from alignment_gap.judges.contract import PROBABILITIES, REWARDS, Judge, JudgeConfig
from alignment_gap.models import PreferenceModel
from alignment_gap.sharding import LogicalMesh, batch_sharding, on_every_process, within
from alignment_gap.training import Bases, load_preference_model


def accepts(name: str) -> bool:
    """Whether this module opens the judge of this name: any folder."""
    return True


def own_labels(name: str) -> str:
    """What the judge of this name gives by itself: rewards where it has them, else hard preferences."""
    network = on_every_process(lambda: judge_network(JudgeConfig(name)))
    return REWARDS if network.kind == "bradley_terry" else "hard"


def check(name: str) -> None:
    """Raises UserError where the folder holds no preference model."""
    judge_network(JudgeConfig(name))


def open_judge(config: JudgeConfig, dataset: Dataset, mesh: LogicalMesh, bases: Bases) -> Judge:
    """The judge of a run's folder.

    Raises:
      UserError: the folder holds no preference model, or one of another vocabulary; or rewards are asked of a pairwise
        model, which has none.
    """
    folder = str(config.judge)
    network = on_every_process(lambda: judge_network(config))
    check_vocabulary(network, dataset.card.vocabulary_digest, folder, str(dataset.folder))
    model, params = load_preference_model(folder, mesh, config.step, bases)
    scores = functools.partial(make_scores(model, config.labels, mesh), params)
    kind = REWARDS if config.labels == REWARDS else PROBABILITIES
    return Judge(scores, kind, {"judge": folder, "judge.digest": params_digest(params)})


def judge_network(config: JudgeConfig) -> Network:
    """What the folder of a judge holds, from its metadata alone; raises UserError where it cannot be this judge."""
    folder = str(config.judge)
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
