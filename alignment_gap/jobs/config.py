"""The settings of a training job: one tree of frozen dataclasses, which gin files and studies build."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from alignment_gap import checks, losses
from alignment_gap.data.batches.order import ORDERS, SEED_LIMIT
from alignment_gap.errors import UserError
from alignment_gap.judges import REWARDS, JudgeConfig
from alignment_gap.models import AdapterConfig, DecoderConfig, T5Config
from alignment_gap.models.preference import KINDS
from alignment_gap.sampling import KEEP, SamplerConfig
from alignment_gap.sharding import MeshConfig
from alignment_gap.training import GuardConfig, KeepConfig, OptimizerConfig

POLICY = "policy"
REFERENCE_LOG_PROBS = ("auto", "stored", "each_step")
AGAINST = ("each_other", "mixture")
# Steps are counted in int32.
MOST_STEPS = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """A loss by name.

    Attributes:
      name: one of `losses.names()`, or "module:function" for a loss of one's own.
      settings: its keyword-only parameters, such as {"beta": 0.1}.
    """

    name: str = "ipo"
    # A mapping has no hash; equality still compares it.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Raises UserError for a name or a setting that there is not, or a number that is not finite."""
        self.function()
        for name, value in self.settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"settings.{name} is {value}: it must be finite")

    def function(self) -> Callable[..., Any]:
        """The loss with its settings bound; raises UserError where they, or what it says that it reads, are wrong."""
        try:
            loss = losses.get(self.name, **self.settings)
            losses.reads(loss)
            return loss
        except ValueError as error:
            raise UserError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Recorded examples: a source of batches, or of the prompts that an online source answers.

    Attributes:
      folder: a prepared dataset, or several, with commas between.
      weights: of each dataset, in any unit; None for every example of all of them once an epoch.
      batch_size: prompts of a step, over all devices.
      order: "shuffle" (anew in every epoch), "recorded" or "window"; see `offline_source`.
      window: batches in a window; for order "window" only.
      prompt_length: tokens that prompts are padded to at most; None for the datasets' longest.
      response_length: tokens that responses are padded to at most; None for the datasets' longest.
      buckets: shapes that batches are padded to at most, chosen from the lengths so that padding is least; each is
        compiled once.
      packing: rows hold as many prompts with their responses as fit into so many times the longest; None for one
        prompt a row. Without buckets only.
      epochs: how often the data may be gone through; None for any number of times.
      vocabulary: where the datasets' vocabulary is, if it has moved.
      prefetch: batches that are read and put on the devices ahead of their step.
    """

    folder: str | None = None
    weights: tuple[float, ...] | None = None
    batch_size: int = 32
    order: str = "shuffle"
    window: int | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    buckets: int = 1
    packing: int | None = None
    epochs: int | None = None
    vocabulary: str | None = None
    prefetch: int = 2

    def __post_init__(self) -> None:
        """Raises UserError where a setting is out of its range, or two do not go together."""
        checks.one_of(self, ORDERS, "order")
        lengths = ("prompt_length", "response_length")
        checks.at_least(self, 1, "batch_size", "window", *lengths, "buckets", "packing", "epochs")
        checks.at_least(self, 0, "prefetch")
        if (self.window is None) == (self.order == "window"):
            raise UserError(
                f"window is {self.window} with order {self.order!r}: set it for order window, and only then"
            )
        if self.packing is not None and self.buckets != 1:
            raise UserError(f"packing is {self.packing} and buckets is {self.buckets}: choose one of them")


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """Fresh samples of the policy that is trained, labelled by a judge: a source of batches.

    Attributes:
      prompts: the datasets whose prompts are answered, and how many a step.
      samples: responses drawn for each prompt, K.
      judge: who scores them; without one all scores are 0.5.
      keep: what is made of the K samples: "all", "best_and_worst" (a pair) or "best" (one response).
      against: what a sample is scored against: "each_other", or one sample of the "mixture" for each prompt (Nash-MD).
      mixture: b of the mixture pi^(1 - b) ref^b, from 0 to 1. Against each other, the samples come from it (IPO-MD).
      sampler: how tokens are drawn.
      response_length: most tokens of a response; None for the longest of the prompts' datasets.
      refresh_every: steps after which the sampler takes the policy's parameters: 1 is online, s is semi-online, 0 never
        (the sampler stays at the start).
      record: whether the stream is kept as a dataset, in the job's folder `record`.
    """

    prompts: DatasetConfig = DatasetConfig()
    samples: int = 2
    judge: JudgeConfig = JudgeConfig()
    keep: str = "all"
    against: str = "each_other"
    mixture: float | None = None
    sampler: SamplerConfig = SamplerConfig()
    response_length: int | None = None
    refresh_every: int = 1
    record: bool = True

    def __post_init__(self) -> None:
        """Raises UserError where a setting is out of its range, or two do not go together."""
        checks.at_least(self, 1, "samples", "response_length")
        checks.at_least(self, 0, "refresh_every")
        checks.one_of(self, KEEP, "keep")
        checks.one_of(self, AGAINST, "against")
        checks.within(self, 0, 1, "mixture")
        if self.prompts.packing is not None:
            raise UserError(
                f"prompts.packing is {self.prompts.packing}: samples are drawn one prompt a row, leave it out"
            )
        compared = self.judge.judge is not None and self.against == "each_other" and self.judge.labels != REWARDS
        if self.samples < 2 and (compared or self.keep != "all"):
            raise UserError(f"samples is {self.samples}: nothing can be compared, draw 2 or more")
        if self.keep != "all" and self.judge.judge is None:
            raise UserError(f"keep is {self.keep!r}, but there is no judge: set judge, or keep all")
        if self.against == "mixture" and (self.mixture is None or self.judge.judge is None):
            raise UserError("against is 'mixture', but mixture or judge is not set: set both")
        if self.against == "mixture" and self.judge.labels == REWARDS:
            raise UserError("against is 'mixture' and judge.labels is 'rewards': choose hard or soft preferences")


SourceConfig = DatasetConfig | OnlineConfig


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """What is seen of a job while it trains; none of it changes what is trained.

    Attributes:
      validation: folder of held-out examples, in the vocabulary of the source's; None for none. Loss and diagnostics
        are means over their whole batches, of the size of the source's.
      validate_every: steps between two validations; the last step has one too.
      tensorboard: whether metrics are written for TensorBoard beside JSON lines.
      profile: the first and the last step, counted from 1, that jax's profiler sees; None for no profile.
      hang_after: seconds without a step after which the job ends with exit status 1; None for never.
    """

    validation: str | None = None
    validate_every: int = 200
    tensorboard: bool = False
    profile: tuple[int, int] | None = None
    hang_after: float | None = 3600.0

    def __post_init__(self) -> None:
        """Raises UserError where a setting is out of its range."""
        checks.at_least(self, 1, "validate_every")
        checks.above(self, 0, "hang_after")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[-1]:
            raise UserError(f"profile is {self.profile}: give the first and the last step, such as (10, 12)")


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """One training job: network, objective, source, reference and optimizer.

    Attributes:
      model: the policy; None for the one of `start`.
      kind: "policy"; or a preference model, "pairwise" or "bradley_terry", which asks the policy.
      loss: what a policy is trained with; a preference model learns the labels.
      source: where batches come from: recorded examples, or fresh samples.
      fresh: a second source, whose batch stands beside that of the first: for a loss that reads both, as hypo.
      adapter: low-rank adapters that are trained in place of all parameters, on those of `start`.
      optimizer: its settings.
      guard: which updates are skipped.
      mesh: the device mesh.
      steps: gradient steps; None for those of the source's epochs.
      checkpoint_every: steps between two checkpoints; the last step has one too.
      checkpoint_steps: further steps that have one.
      keep: which checkpoints stay.
      log_every: steps between two lines of metrics.
      monitor: what else is seen of the job.
      microbatches: parts in which a step's batch is computed, one after the other, to save memory.
      seed: of fresh parameters, of the order of examples and of samples.
      start: folder of the run whose parameters training starts from; None for fresh ones.
      start_step: which of its checkpoints; None for the last.
      reference: folder of the run that is the reference policy; None for the one of `start`.
      reference_step: which of its checkpoints; None for the last.
      reference_log_probs: of recorded examples the reference's log-probs are "stored" beside the dataset, and computed
        first where they are not; or computed in "each_step"; or "auto": the stored ones where there are any. Stored
        ones count only for the same dataset, checkpoint, lengths and precision.
      reference_every: steps after which the reference moves to the policy (TR-DPO, arXiv 2404.09656); None for one that
        stays. Its log-probs are then computed in each step.
      reference_alpha: the policy's share in a reference that moves: 1 makes it a copy of the policy; below 1 it is the
        moving average alpha * policy + (1 - alpha) * reference.
    """

    model: T5Config | DecoderConfig | None = None
    kind: str = POLICY
    loss: LossConfig = LossConfig()
    source: DatasetConfig | OnlineConfig = DatasetConfig()
    fresh: DatasetConfig | OnlineConfig | None = None
    adapter: AdapterConfig = AdapterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int | None = 1000
    checkpoint_every: int = 200
    checkpoint_steps: tuple[int, ...] = ()
    keep: KeepConfig = KeepConfig()
    log_every: int = 20
    monitor: MonitorConfig = MonitorConfig()
    microbatches: int = 1
    seed: int = 0
    start: str | None = None
    start_step: int | None = None
    reference: str | None = None
    reference_step: int | None = None
    reference_log_probs: str = "auto"
    reference_every: int | None = None
    reference_alpha: float = 1.0

    def __post_init__(self) -> None:
        """Raises UserError where a setting is out of its range, or two do not go together."""
        checks.one_of(self, (POLICY, *KINDS), "kind")
        checks.one_of(self, REFERENCE_LOG_PROBS, "reference_log_probs")
        checks.within(self, 1, MOST_STEPS, "steps")
        checks.at_least(self, 1, "checkpoint_every", "log_every", "microbatches", "reference_every")
        checks.above(self, 0, "reference_alpha")
        checks.within(self, 0, 1, "reference_alpha")
        checks.at_least(self, 0, "start_step", "reference_step")
        checks.within(self, 0, SEED_LIMIT - 1, "seed")
        if any(step < 1 for step in self.checkpoint_steps):
            raise UserError(f"checkpoint_steps is {self.checkpoint_steps}: steps count from 1")
        if self.keep.best is not None and self.monitor.validation is None:
            raise UserError(
                f"keep.best is {self.keep.best}, but monitor.validation is not set: set it to the folder of held-out "
                "examples"
            )
        if self.adapter.rank is not None and self.start is None:
            raise UserError(
                f"adapter.rank is {self.adapter.rank}, but start is not set: set it to the folder of the run whose "
                "parameters the adapters are added to"
            )
        if self.kind != POLICY and self.reference is not None:
            raise UserError(f"reference is {self.reference!r}: a preference model has none, leave it out")
        if self.kind != POLICY and (isinstance(self.source, OnlineConfig) or self.fresh is not None):
            raise UserError(f"kind is {self.kind!r}: a preference model learns from recorded examples alone")
        if self.fresh is not None and isinstance(self.source, OnlineConfig):
            raise UserError("fresh is set beside an online source: it stands beside recorded examples, leave it out")
        if self.fresh is not None and (size := recorded(self.fresh).batch_size) != self.recorded.batch_size:
            raise UserError(f"fresh has batch_size={size} and source {self.recorded.batch_size}: give both the same")
        if self.online is not None and self.online.mixture is not None and self.start is self.reference is None:
            raise UserError(
                f"mixture is {self.online.mixture}, which is one with the reference: set start or reference, or leave "
                "it out"
            )

        self._check_moving()

    def _check_moving(self) -> None:
        """Raises UserError where the reference moves and cannot."""
        moving = f"reference_every is {self.reference_every}"
        if self.reference_every is None:
            if self.reference_alpha != 1:
                raise UserError(f"reference_alpha is {self.reference_alpha}, but reference_every is not set: set both")
        elif self.kind != POLICY:
            raise UserError(f"{moving}: a preference model has no reference, leave it out")
        elif self.start is self.reference is None:
            raise UserError(f"{moving}, but there is no reference: set start or reference to the folder of a run")
        elif self.reference_log_probs == "stored":
            raise UserError(f"{moving}, and stored log-probs are of a reference that stays: leave one of the two out")
        elif self.adapter.rank is not None and self.reference is not None:
            raise UserError(f"{moving} with adapters, whose reference begins at start: leave reference out")

    @property
    def recorded(self) -> DatasetConfig:
        """The datasets of the source: its examples, or its prompts."""
        return recorded(self.source)

    @property
    def online(self) -> OnlineConfig | None:
        """The source of fresh samples, where there is one."""
        return next((each for each in (self.source, self.fresh) if isinstance(each, OnlineConfig)), None)


def recorded(source: SourceConfig) -> DatasetConfig:
    """The datasets of a source: its examples, or its prompts."""
    return source.prompts if isinstance(source, OnlineConfig) else source
