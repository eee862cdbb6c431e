"""A whole study as one tree of frozen dataclasses, and the arms that follow from it."""

from __future__ import annotations

import dataclasses
import inspect
import math

from alignment_gap import losses
from alignment_gap.data.tasks.task import HumanPairsTaskConfig, PostsTaskConfig
from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.models.preference import KINDS
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import MeshConfig, check_batch_size
from alignment_gap.training import OptimizerConfig

INITIALISATIONS = ("sft", "random")


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning of the policy on both responses of every human pair.

    Attributes:
      steps: gradient steps.
      batch_size: prompts, each with two targets.
      optimizer: its settings.
    """

    steps: int = 1000
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A preference model: the golden one, trained on human labels, or the proxy, trained on the golden one's.

    Attributes:
      model: its network.
      kind: "pairwise" (both responses in context) or "bradley_terry".
      initialisation: "sft" starts from the SFT policy, whose sizes `model` then has; "random" from nothing.
      steps: gradient steps.
      batch_size: pairs.
      optimizer: its settings.
    """

    model: T5Config | DecoderConfig = T5Config()
    kind: str = "pairwise"
    initialisation: str = "sft"
    steps: int = 1000
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()


@dataclasses.dataclass(frozen=True)
class ArmsConfig:
    """The arms: one online setting, and a sweep offline, with the same number of steps and the same batch.

    Attributes:
      losses: names in the registry of losses.
      checkpoint_steps: increasing; every one is evaluated, the last is the number of steps.
      batch_size: prompts, with two responses each.
      optimizer: settings of all arms; its learning rate is the online one's.
      beta: regularisation of the online arms and of the golden policy.
      offline_betas: swept offline.
      offline_learning_rates: swept offline.
    """

    losses: tuple[str, ...] = ("ipo", "best_of_n")
    checkpoint_steps: tuple[int, ...] = (50, 100, 200, 400)
    batch_size: int = 64
    optimizer: OptimizerConfig = OptimizerConfig()
    beta: float = 0.1
    offline_betas: tuple[float, ...] = (0.1,)
    offline_learning_rates: tuple[float, ...] = (1e-3,)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How every checkpoint is measured.

    Attributes:
      prompts: training prompts, one sample each, for win rates, rubric and length.
      kl_prompts: those of them whose samples measure KL.
      pairs: pairs of D_golden to classify.
      batch_size: of the measurement.
      shown: sampled responses that the report shows.
    """

    prompts: int = 512
    kl_prompts: int = 256
    pairs: int = 256
    batch_size: int = 128
    shown: int = 4


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """The controlled study of arXiv 2405.08448 at any size.

    Attributes:
      name: of the study, for the report's title.
      seed: first seed.
      seeds: how many times everything is repeated, data and judges included, with seed, seed + 1, ...
      task: where prompts and human pairs come from.
      policy: the network that all arms train.
      sizes: names of `models.sizes`: a scaling study, which is one study for each with its shape for the policy's.
      golden: the preference model that stands for the human.
      proxy: the preference model that online arms are trained against.
      sft: supervised fine-tuning.
      arms: the arms.
      sampler: how policies are sampled, online and in evaluation.
      evaluation: how checkpoints are measured.
      checkpoint_every: steps of SFT and of the judges after which a killed run can be taken up; changes no result.
      microbatches: parts in which the batch of a training step is computed, one after the other, to save memory.
      mesh: the device mesh.
    """

    name: str = "study"
    seed: int = 0
    seeds: int = 1
    task: PostsTaskConfig | HumanPairsTaskConfig = PostsTaskConfig()
    policy: T5Config | DecoderConfig = T5Config()
    sizes: tuple[str, ...] = ()
    golden: JudgeConfig = JudgeConfig()
    proxy: JudgeConfig = JudgeConfig()
    sft: SftConfig = SftConfig()
    arms: ArmsConfig = ArmsConfig()
    sampler: SamplerConfig = SamplerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint_every: int = 250
    microbatches: int = 1
    mesh: MeshConfig = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Arm:
    """One training run: where its pairs come from, and its loss.

    Attributes:
      name: "golden" (the golden policy), "online", "offline" or "shuffled".
      loss: name in the registry.
      beta: regularisation; nan where the loss has none.
      learning_rate: of the run.
    """

    name: str
    loss: str
    beta: float
    learning_rate: float

    @property
    def title(self) -> str:
        """A name for folders and progress bars that tells all arms of a study apart."""
        beta = "" if math.isnan(self.beta) else f"-beta{self.beta:g}"
        return f"{self.name}-{self.loss}{beta}-lr{self.learning_rate:g}"


def takes_beta(loss: str) -> bool:
    """Whether a loss has the setting beta."""
    return "beta" in inspect.signature(losses.get(loss)).parameters


def golden_arm(config: StudyConfig) -> Arm:
    """The golden policy: online IPO against the golden model at the online setting."""
    return Arm("golden", "ipo", config.arms.beta, config.arms.optimizer.learning_rate)


def arms(config: StudyConfig) -> list[Arm]:
    """All arms but the golden policy; those on shuffled D_online follow the online arm whose stream they read."""
    settings = config.arms
    found = []
    for loss in settings.losses:
        beta = settings.beta if takes_beta(loss) else math.nan
        betas = settings.offline_betas if takes_beta(loss) else (math.nan,)
        online_rate = settings.optimizer.learning_rate
        found += [Arm(name, loss, beta, online_rate) for name in ("online", "shuffled")]
        found += [Arm("offline", loss, b, rate) for b in betas for rate in settings.offline_learning_rates]
    return found


def validate(config: StudyConfig, devices: int) -> None:
    """Raises UserError for the first setting that cannot be run, before any work is done."""
    try:
        config.task.validate()
    except UserError as error:
        raise UserError(f"task.{error}") from error
    _positive("seeds", config.seeds)
    _positive("checkpoint_every", config.checkpoint_every)
    for loss in config.arms.losses:
        try:
            losses.get(loss)
        except ValueError as error:
            raise UserError(f"arms.losses: {error}") from error
    steps = config.arms.checkpoint_steps
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1:
        raise UserError(f"arms.checkpoint_steps is {steps}: it must be increasing and positive, such as (50, 100)")
    if config.arms.beta <= 0 or any(beta <= 0 for beta in config.arms.offline_betas):
        raise UserError(f"arms.beta={config.arms.beta}, offline_betas={config.arms.offline_betas}: all must be above 0")
    for name in ("golden", "proxy"):
        _check_judge(name, getattr(config, name), config)
    evaluation = config.evaluation
    _positive("evaluation.prompts", evaluation.prompts)
    if evaluation.kl_prompts > evaluation.prompts:
        raise UserError(
            f"evaluation.kl_prompts is {evaluation.kl_prompts}, over evaluation.prompts={evaluation.prompts}: lower it"
        )
    _positive("microbatches", config.microbatches)
    data, fsdp, _ = config.mesh.shape(devices)
    for name in ("sft", "golden", "proxy", "arms", "evaluation"):
        size = getattr(config, name).batch_size
        _positive(f"{name}.batch_size", size)
        check_batch_size(f"{name}.batch_size", size, data * fsdp, 1 if name == "evaluation" else config.microbatches)


def _check_judge(name: str, judge: JudgeConfig, config: StudyConfig) -> None:
    _positive(f"{name}.steps", judge.steps)
    if judge.kind not in KINDS:
        raise UserError(f"{name}.kind is {judge.kind!r}: choose one of {', '.join(KINDS)}")
    if judge.initialisation not in INITIALISATIONS:
        choices = ", ".join(INITIALISATIONS)
        raise UserError(f"{name}.initialisation is {judge.initialisation!r}: choose one of {choices}")
    if judge.initialisation == "sft" and judge.model != config.policy:
        raise UserError(
            f"{name}.model differs from the policy, so it cannot start from the SFT policy: "
            f"make them equal, or set {name}.initialisation to random"
        )


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} is {value}: it must be at least 1")
