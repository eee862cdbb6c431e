"""The networks of one seed of a study and the functions compiled for them, each made once and used by every stage."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from alignment_gap.checkpoints import CHECKPOINTS, network_of, preference_network
from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.offline import offline_source
from alignment_gap.data.records.dataset import Example
from alignment_gap.data.tasks.task import task_rubric, task_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.evaluation.datasets import Batching
from alignment_gap.evaluation.metrics import make_divergence, make_judge
from alignment_gap.models import Policy, PreferenceModel, make_policy
from alignment_gap.sampling import make_generate
from alignment_gap.sharding import LogicalMesh, put_batch, replicated
from alignment_gap.study.artefacts import Progress
from alignment_gap.study.config import JudgeConfig, StudyConfig
from alignment_gap.training import (
    Checkpoints,
    Objective,
    OptimizerConfig,
    Source,
    abstract_params,
    abstract_state,
    create_state,
    make_optimizer,
    make_score,
    make_update_step,
    state_from_params,
    train,
)


class Bench:
    """What the stages of one seed work with.

    Attributes:
      config: the study.
      seed: of this repetition.
      mesh: the device mesh.
      vocabulary: of the task.
      rubric: true quality, or None.
      policy: the network of all arms.
      golden, proxy: the preference models.
      batching: how examples are measured, labelled and answered.
    """

    def __init__(self, config: StudyConfig, seed: int, mesh: LogicalMesh) -> None:
        self.config, self.seed, self.mesh = config, seed, mesh
        self.vocabulary, self.rubric = task_vocabulary(config.task), task_rubric(config.task)
        self.policy = make_policy(config.policy)
        self.golden, self.proxy = self._preference_model(config.golden), self._preference_model(config.proxy)
        shape = (config.task.prompt_length, config.task.response_length)
        self.batching = Batching(mesh, config.evaluation.batch_size, (shape,))
        self.score = make_score(self.policy, mesh)
        self.divergence = make_divergence(self.policy, mesh)
        self.golden_judge, self.proxy_judge = make_judge(self.golden, mesh), make_judge(self.proxy, mesh)
        self._check_vocabulary()

    @functools.cached_property
    def draw_pairs(self) -> Callable[..., Any]:
        """Two samples a prompt, for training."""
        return self._generate(2)

    @functools.cached_property
    def draw_one(self) -> Callable[..., Any]:
        """One sample a prompt, for evaluation."""
        return self._generate(1)

    def key(self, name: str) -> jax.Array:
        """The random key of this name and seed, on every device."""
        return jax.device_put(jax.random.fold_in(jax.random.key(self.seed), self.number(name)), replicated(self.mesh))

    def number(self, name: str) -> int:
        """A 32-bit number from this name and seed, to seed what is no jax.random."""
        return zlib.crc32(f"{self.seed} {name}".encode())

    def offline(self, name: str, examples: Sequence[Example], batch_size: int) -> Callable[[int], PreferenceBatch]:
        """Shuffled batches on the device; the order depends on the name and the seed."""
        task = self.config.task
        source = offline_source(
            examples,
            batch_size=batch_size,
            seed=self.number(name),
            prompt_length=task.prompt_length,
            response_length=task.response_length,
        )
        return lambda step: put_batch(source(step), self.mesh, batch_size)

    def train(
        self,
        folder: Path,
        progress: Progress,
        *,
        name: str,
        objective: Objective,
        optimizer: OptimizerConfig,
        source: Source,
        checkpoint_steps: Sequence[int],
        network: Policy | PreferenceModel,
        params: Any | None = None,
        on_checkpoint: Callable[[int, list[PreferenceBatch]], None] | None = None,
    ) -> None:
        """Trains a network into `folder`, from `params` or from fresh ones; goes on where an earlier call stopped."""
        transformation = make_optimizer(optimizer)
        policy = network.policy if isinstance(network, PreferenceModel) else network
        abstract = abstract_state(policy.init, transformation, self.mesh)
        if params is None:
            state = create_state(policy.init, transformation, self.mesh, self.key(name))
        else:
            state = state_from_params(params, abstract, transformation)
        with Checkpoints(folder / CHECKPOINTS, network_of(network, self.vocabulary.digest)) as checkpoints:
            train(
                state,
                make_update_step(objective, transformation, self.mesh, abstract, microbatches=self.config.microbatches),
                source,
                checkpoint_steps=checkpoint_steps,
                checkpoints=checkpoints,
                metrics_path=folder / "metrics.jsonl",
                on_checkpoint=on_checkpoint,
                progress=progress,
            )

    def params(self, folder: Path, network: Policy, step: int | None = None) -> Any:
        """The parameters that a training stage left, of one step or of the last."""
        with Checkpoints(folder / CHECKPOINTS) as checkpoints:
            return checkpoints.restore_params(abstract_params(network.init, self.mesh), step)

    def checkpoint_steps(self, steps: int) -> list[int]:
        """Where a run of so many steps, whose last parameters alone are used, can be taken up again."""
        return [*range(self.config.checkpoint_every, steps, self.config.checkpoint_every), steps]

    def _preference_model(self, judge: JudgeConfig) -> PreferenceModel:
        return preference_network(judge.kind, judge.model, self.vocabulary).preference_model()

    def _generate(self, samples: int) -> Callable[..., Any]:
        return make_generate(
            self.policy,
            self.mesh,
            samples=samples,
            max_length=self.config.task.response_length,
            eos_id=self.vocabulary.eos_id,
            config=self.config.sampler,
        )

    def _check_vocabulary(self) -> None:
        networks = {"policy": self.config.policy, "golden": self.config.golden.model, "proxy": self.config.proxy.model}
        for name, model in networks.items():
            if model.vocabulary_size < self.vocabulary.size:
                raise UserError(
                    f"{name} has vocabulary_size={model.vocabulary_size} but the task's vocabulary has "
                    f"{self.vocabulary.size} ids: raise it to at least that"
                )
