"""The settings of a whole study: one tree of frozen dataclasses."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

from alignment_gap import checks
from alignment_gap.checks import nearest
from alignment_gap.configuration import flatten, to_dict
from alignment_gap.data.tasks.prepare import PrepareConfig
from alignment_gap.data.text import TextSourceConfig
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.models.preference import KINDS
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import MeshConfig
from alignment_gap.study.analysis import ORIGIN
from alignment_gap.study.arms import ARMS, arms_of
from alignment_gap.study.claims import claims_of
from alignment_gap.training import OptimizerConfig

# Kinds of pairs that policies may classify in addition to pairs of D_golden.
HELDOUT, STREAM, OWN = CLASSIFIED = ("heldout", "stream", "own")


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning of the policy on both responses of every pair.

    Attributes:
      start: folder of the run that fine-tuning starts from, such as an imported checkpoint; None for fresh parameters.
      also: additional prepared datasets that are pooled with the task's training pairs.
      weights: weight of the task, then of each dataset in `also`, in any unit; None to use every example once per
        epoch.
      steps: gradient steps.
      batch_size: prompts per step; each prompt has two targets.
      buckets: maximum number of padded shapes of a batch; more shapes save padding where lengths differ.
      optimizer: the optimizer and its schedule.
    """

    start: str | None = None
    also: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None
    steps: int = 1000
    batch_size: int = 64
    buckets: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "steps", "batch_size", "buckets")
        if self.weights is not None and len(self.weights) != 1 + len(self.also):
            raise UserError(f"weights is {self.weights}: give one for the task and for each of also, or None")


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """A network that is fine-tuned like the policy; the golden policy and the judges start from it.

    Attributes:
      model: the network; None for the network that its fine-tuning starts from.
      sft: settings of its fine-tuning; None for the policy's settings with fresh parameters.
      batch_size: prompts per step for the golden policy; None for that of the arms.
      learning_rate: learning rate of the golden policy; None for that of the arms.
    """

    model: T5Config | DecoderConfig | None = T5Config()
    sft: SftConfig | None = None
    batch_size: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or there is no network."""
        checks.at_least(self, 1, "batch_size")
        checks.above(self, 0, "learning_rate")
        if self.model is None and (self.sft is None or self.sft.start is None):
            raise UserError("model and sft.start are not set: give one of them")


@dataclasses.dataclass(frozen=True)
class PreferenceModelConfig:
    """A preference model: the golden model, trained on human labels, or the proxy, trained on the golden labels.

    Attributes:
      model: its network; None for the network of its start.
      kind: "pairwise" (both responses in context) or "bradley_terry".
      start: "sft" to start from the policy (or the study's `base`) after supervised fine-tuning; or the folder of a
        run; or None for fresh parameters.
      steps: gradient steps.
      batch_size: pairs per step.
      buckets: maximum number of padded shapes of a batch, as for SFT.
      optimizer: the optimizer and its schedule.
    """

    model: T5Config | DecoderConfig | None = None
    kind: str = "pairwise"
    start: str | None = ORIGIN
    steps: int = 1000
    batch_size: int = 64
    buckets: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or two settings conflict."""
        checks.one_of(self, KINDS, "kind")
        checks.at_least(self, 1, "steps", "batch_size", "buckets")
        if self.start is None and self.model is None:
            raise UserError("model and start are not set: give one of them")


@dataclasses.dataclass(frozen=True)
class ArmsConfig:
    """The arms: online at one setting, offline at a sweep of settings, all with the same batch size.

    Attributes:
      names: names of arms in the table, or "module:object" for a custom arm; an arm must come after the arms whose runs
        it reads.
      further: arms that are trained only under the first loss, after the others.
      losses: names of losses, or "module:function" for a custom loss. An arm with its own loss uses that loss instead.
      swept: arms that are trained at every setting of the offline sweep; other arms are trained at one setting.
      start: folder of the run that arms start from; None for the SFT policy. The reference is always the SFT policy.
      checkpoint_steps: steps of the checkpoints, increasing; each is evaluated, and the last is the number of steps.
      batch_size: prompts per step, with two responses each.
      optimizer: optimizer of all arms; its learning rate is that of the online arms.
      beta: regularisation of the online arms and of the golden policy.
      offline_betas: values of beta in the offline sweep.
      offline_learning_rates: learning rates in the offline sweep.
      offline_steps: lengths in the offline sweep, as multiples of the online steps, for the first arm of `swept` under
        the first loss; all other runs use only the first multiple. The distance between checkpoints is multiplied too.
      stored_reference: whether a job scores D_golden under the SFT policy once, for all runs that train on it. If not,
        each of them scores its batches in every step.
    """

    names: tuple[str, ...] = ("online", "shuffled", "offline")
    further: tuple[str, ...] = ()
    losses: tuple[str, ...] = ("ipo", "best_of_n")
    swept: tuple[str, ...] = ("offline",)
    start: str | None = None
    checkpoint_steps: tuple[int, ...] = (50, 100, 200, 400)
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    beta: float = 0.1
    offline_betas: tuple[float, ...] = (0.1,)
    offline_learning_rates: tuple[float, ...] = (1e-3,)
    offline_steps: tuple[int, ...] = (1,)
    stored_reference: bool = False

    def __post_init__(self) -> None:
        """Raises UserError if a setting is unknown or out of its range."""
        names = [arm.name for arm in arms_of((*self.names, *self.further))]
        for name in self.swept:
            if name not in names and not any(name == arm.name for arm in ARMS):
                raise UserError(f"swept has {name!r}, which is not an arm: {nearest(name, names)}")
        steps = self.checkpoint_steps
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
            raise UserError(f"checkpoint_steps is {steps}: it must be increasing and positive, such as (50, 100)")
        checks.at_least(self, 1, "batch_size")
        checks.above(self, 0, "beta")
        for name in ("offline_betas", "offline_learning_rates", "offline_steps"):
            if not all(0 < value < float("inf") for value in getattr(self, name)) or not getattr(self, name):
                raise UserError(f"{name} is {getattr(self, name)}: give one or more numbers, all above 0 and finite")
        for name in ("losses", "offline_betas", "offline_learning_rates", "offline_steps"):
            values = getattr(self, name)
            # Formatted as in the names of jobs.
            if len({value if isinstance(value, str) else f"{value:g}" for value in values}) < len(values):
                raise UserError(f"{name} is {values}: give each value once")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How every checkpoint is measured.

    Attributes:
      prompts: number of training prompts, with one sample each, for win rates and length.
      kl_prompts: number of these prompts whose samples measure KL.
      pairs: number of pairs of D_golden to classify.
      judges: additional judges besides golden and proxy, as NAME=JUDGE; "rubric" is true quality in the built-in task.
      classified: further pairs that policies classify by the golden model's labels, besides pairs of D_golden that they
        may have trained on. "heldout": held-out pairs of D_golden; "stream": pairs of the online arm; "own": two of
        their own samples for each prompt.
      baselines: whether the report has the accuracy of simple baselines on the human labels, which the golden model has
        to beat.
      batch_size: prompts at a time in the evaluation.
      shown: number of sampled responses in the report.
    """

    prompts: int = 512
    kl_prompts: int = 256
    pairs: int = 256
    judges: tuple[str, ...] = ()
    classified: tuple[str, ...] = ()
    baselines: bool = False
    batch_size: int = 128
    shown: int = 4

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "prompts", "kl_prompts", "pairs", "batch_size")
        checks.at_least(self, 0, "shown")
        for name in self.classified:
            if name not in CLASSIFIED:
                raise UserError(f"classified has {name!r}: {nearest(name, CLASSIFIED)}")


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The controlled study of arXiv 2405.08448 at any size.

    Attributes:
      name: name of the study, for the report's title.
      seed: the first seed.
      seeds: number of seeds: seed, seed + 1, ... Everything is repeated for each, including the judges and the data of
        the built-in task.
      prepared: folder of a prepared dataset with train/ and validation/; None to prepare `task`.
      task: how to prepare the data, once for each seed.
      policy: the network that all arms train; None for the network that SFT starts from.
      sizes: names in `models.sizes`, for a scaling study: one study for each size, whose policy has that shape, and one
        report over all sizes. In `sft.start`, "{size}" stands for the name.
      by_size: settings with a value for each of `sizes`, such as "sft.steps=4000,8000,8000".
      base: network that the golden policy and the judges start from, one for all sizes; None for the SFT policy.
      golden: the preference model that stands for the human.
      proxy: the preference model that online arms are trained against.
      sft: settings of supervised fine-tuning.
      arms: the arms.
      sampler: how policies are sampled, online and in evaluation.
      evaluation: how checkpoints are measured.
      claims: custom claims in addition to the paper's, as "module:object".
      checkpoint_every: steps between two checkpoints of SFT and of the judges, from which a killed run continues; does
        not change the results.
      microbatches: number of parts that a training step's batch is split into and computed one after the other, to save
        memory.
      mesh: the device mesh.
    """

    name: str = "study"
    seed: int = 0
    seeds: int = 1
    prepared: str | None = None
    task: PrepareConfig = PrepareConfig(TextSourceConfig(location="posts"))
    policy: T5Config | DecoderConfig | None = T5Config()
    sizes: tuple[str, ...] = ()
    by_size: tuple[str, ...] = ()
    base: BaseConfig | None = None
    golden: PreferenceModelConfig = PreferenceModelConfig()
    proxy: PreferenceModelConfig = PreferenceModelConfig()
    sft: SftConfig = SftConfig()
    arms: ArmsConfig = ArmsConfig()
    sampler: SamplerConfig = SamplerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    claims: tuple[str, ...] = ()
    checkpoint_every: int = 250
    microbatches: int = 1
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        claims_of(self.claims)
        checks.at_least(self, 0, "seed")
        checks.at_least(self, 1, "seeds", "checkpoint_every", "microbatches")
        for name, seed in (("task.seed", self.task.seed), ("task.source.posts.seed", self.task.source.posts.seed)):
            if seed:
                raise UserError(f"{name} is {seed}: a study prepares its data with its own seeds, so set seed instead")
        settings_by_size(self)
        if self.policy is None and self.sft.start is None:
            raise UserError("policy and sft.start are not set: give one of them")


def settings_by_size(config: StudyConfig) -> dict[str, tuple[Any, ...]]:
    """The settings of `by_size`, with a value for each of `sizes`; raises UserError for one that cannot be read."""
    found, names = {}, flatten(to_dict(config))
    for given in config.by_size:
        name, _, values = given.partition("=")
        if name not in names:
            raise UserError(f"by_size has {given!r}: {nearest(name, names)}")
        try:
            found[name] = tuple(ast.literal_eval(f"[{values}]"))
        except (SyntaxError, ValueError):
            raise UserError(f"by_size has {given!r}: write NAME=VALUE,VALUE with a value for each of sizes") from None
        if len(found[name]) != len(config.sizes):
            raise UserError(f"by_size has {given!r}, but there are {len(config.sizes)} sizes: give a value for each")
    return found
