"""The settings of a training job: one tree of frozen dataclasses. Gin files and studies build it."""

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
      name: one of `losses.names()`, or "module:function" for a custom loss.
      settings: its keyword-only parameters, such as {"beta": 0.1}.
    """

    name: str = "ipo"
    # A mapping has no hash; equality still compares it.
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Raises UserError if the name or a setting is unknown, or a number is not finite."""
        if not isinstance(self.settings, Mapping):
            name, equals, value = str(self.settings).partition("=")
            raise UserError(
                f"settings is {self.settings!r}: write {{{name!r}: {value}}}"
                if equals
                else f"settings is {self.settings!r}: write a dict, such as {{'beta': 0.1}}"
            )
        self.function()
        for name, value in self.settings.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"settings.{name} is {value}: it must be finite")

    def function(self) -> Callable[..., Any]:
        """The loss with its settings bound; raises UserError if a setting, or the loss's list of inputs, is wrong."""
        try:
            losses.get(self.name)
        except ValueError as error:
            raise UserError(f"name: {error}") from error
        try:
            loss = losses.get(self.name, **self.settings)
            losses.reads(loss)
            return loss
        except ValueError as error:
            raise UserError(f"settings is {dict(self.settings)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Recorded examples: a source of batches, or of the prompts of an online source.

    Attributes:
      folder: folder of a prepared dataset; or several, separated by commas.
      weights: the weight of each dataset, in any unit; None to use every example of all datasets once per epoch.
      batch_size: prompts per step, over all devices.
      order: "shuffle" (a new order in every epoch), "recorded" or "window"; see `offline_source`.
      window: batches in a window; only for order "window".
      prompt_length: maximum padded length of prompts, in tokens; None for the longest in the datasets. In its order,
        the record of an online run has the length that the run padded to.
      response_length: maximum padded length of responses, in tokens; None as for prompts.
      buckets: maximum number of padded shapes. They are chosen from the lengths to minimise padding; each is compiled
        once.
      packing: a row holds as many prompts, with their responses, as fit into this many times the longest; None for one
        prompt per row. Packing excludes buckets.
      epochs: maximum number of passes over the data; None for no limit.
      vocabulary: path of the datasets' vocabulary, if it has moved.
      prefetch: number of batches that are read and put on the devices ahead of their step.
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
        """Raises UserError if a setting is out of range, or two settings conflict."""
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
    """A source of batches that samples the trained policy; a judge scores the samples.

    Attributes:
      prompts: the datasets with the prompts, and the number of prompts per step.
      samples: K, the number of responses drawn for each prompt.
      judge: the judge that scores the samples; without a judge all scores are 0.5.
      keep: which of the K samples to train on: "all", "best_and_worst" (a pair) or "best" (one response).
      against: what a sample is compared with: "each_other", or one sample of the "mixture" per prompt (Nash-MD).
      mixture: b in the mixture pi^(1 - b) ref^b, from 0 to 1. With against="each_other", the samples are drawn from the
        mixture (IPO-MD).
      sampler: how tokens are drawn.
      response_length: maximum tokens of a response; None for the longest in the prompts' datasets.
      refresh_every: the sampler takes the policy's parameters after this many steps. 1 is online, more is semi-online;
        0 means never: the sampler keeps the parameters of the start.
      steps_per_draw: number of steps whose samples are drawn in one call; refresh_every must be a multiple of it. A
        device that waits for weights or links does more work in that time. The caches take that many times the memory.
      record: whether the samples are recorded as a dataset, in the subfolder `record`.
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
    steps_per_draw: int = 1
    record: bool = True

    @property
    def kept(self) -> int:
        """Responses per prompt in the batches."""
        return {"all": self.samples, "best_and_worst": 2, "best": 1}[self.keep]

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or two settings conflict."""
        checks.at_least(self, 1, "samples", "response_length", "steps_per_draw")
        checks.at_least(self, 0, "refresh_every")
        checks.one_of(self, KEEP, "keep")
        checks.one_of(self, AGAINST, "against")
        checks.within(self, 0, 1, "mixture")
        if self.prompts.packing is not None:
            raise UserError(
                f"prompts.packing is {self.prompts.packing}: an online source has one prompt per row, leave it out"
            )
        if self.refresh_every % self.steps_per_draw:
            raise UserError(
                f"steps_per_draw is {self.steps_per_draw} and refresh_every is {self.refresh_every}: the steps of a "
                "draw share the sampler's parameters, so set refresh_every to a multiple of steps_per_draw, or to 0"
            )
        if self.steps_per_draw > 1 and self.prompts.buckets > 1:
            raise UserError(
                f"steps_per_draw is {self.steps_per_draw} and prompts.buckets is {self.prompts.buckets}: the steps of "
                "a draw need prompts of one shape, so leave one of them at 1"
            )
        compared = self.judge.judge is not None and self.against == "each_other" and self.judge.labels != REWARDS
        if self.samples < 2 and (compared or self.keep != "all"):
            raise UserError(f"samples is {self.samples}: there is nothing to compare, draw 2 or more")
        if self.keep != "all" and self.judge.judge is None:
            raise UserError(f"keep is {self.keep!r}, but there is no judge: set judge, or keep all")
        if self.against == "mixture" and (self.mixture is None or self.judge.judge is None):
            raise UserError("against is 'mixture', but mixture or judge is not set: set both")
        if self.against == "mixture" and self.judge.labels == REWARDS:
            raise UserError("against is 'mixture' and judge.labels is 'rewards': choose hard or soft preferences")


SourceConfig = DatasetConfig | OnlineConfig


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """How a training job is monitored; these settings do not change the training.

    Attributes:
      validation: folder of held-out examples with the source's vocabulary; None for no validation. Loss and diagnostics
        are means over whole batches, with the source's batch size; an incomplete last batch is left out. Their own card
        says whether their scores are probabilities or rewards.
      validate_every: steps between two validations; the last step is validated too.
      tensorboard: whether metrics are also written for TensorBoard.
      profile: the first and the last step that jax's profiler traces, counted from 1; None for no profile.
      hang_after: the job ends with exit status 1 after this many seconds without a step; None for never.
    """

    validation: str | None = None
    validate_every: int = 200
    tensorboard: bool = False
    profile: tuple[int, int] | None = None
    hang_after: float | None = 3600.0

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range."""
        checks.at_least(self, 1, "validate_every")
        checks.above(self, 0, "hang_after")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[-1]:
            raise UserError(f"profile is {self.profile}: give the first and the last step, such as (10, 12)")


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """One training job: network, objective, source, reference and optimizer.

    Attributes:
      model: the network; None for the network of `start`.
      kind: "policy"; or a preference model, "pairwise" or "bradley_terry".
      loss: the loss of a policy; a preference model learns the labels, and has no choice of loss.
      source: where batches come from: recorded examples, or fresh samples.
      fresh: a second source, for a loss that reads two batches per step, such as hypo.
      adapter: low-rank adapters on the parameters of `start`; only the adapters are trained.
      optimizer: the optimizer and its schedule.
      guard: which updates are skipped.
      mesh: the device mesh.
      steps: gradient steps; None to run the source's epochs.
      checkpoint_every: steps between two checkpoints; the last step has one too.
      checkpoint_steps: additional steps that get a checkpoint.
      keep: which checkpoints are kept.
      log_every: steps between two lines of metrics.
      monitor: validation, TensorBoard, profile and watchdog.
      microbatches: number of parts that a step's batch is split into and computed one after the other, to save memory.
      seed: seed of fresh parameters, of the order of examples, and of samples.
      start: folder of the run whose parameters training starts from; None for fresh parameters.
      start_step: step of the checkpoint in `start`; None for the last.
      reference: folder of the run that is the reference policy; None for `start`.
      reference_step: step of the checkpoint in `reference`; None for the last.
      reference_log_probs: where the reference's log-probs of recorded examples come from. "stored": from beside the
        dataset; if they are not there, they are computed and stored first. "each_step": they are computed in each step.
        "auto": the stored ones if there are any when the job begins, otherwise in each step. Stored log-probs are used
        only for the same dataset, checkpoint, lengths and precision.
      reference_every: the reference moves towards the policy after this many steps (TR-DPO, arXiv 2404.09656); None
        for a fixed reference. The log-probs of a moving reference are computed in each step.
      reference_alpha: weight of the policy when the reference moves: alpha * policy + (1 - alpha) * reference. 1 copies
        the policy; a smaller value gives a moving average.
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
        """Raises UserError if a setting is out of range, or two settings conflict."""
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
            raise UserError(f"kind is {self.kind!r}: a preference model learns only from recorded examples")
        if self.fresh is not None and isinstance(self.source, OnlineConfig):
            raise UserError("fresh is set, but source is online too: fresh needs a source of recorded examples")
        if self.fresh is not None and (size := recorded(self.fresh).batch_size) != self.recorded.batch_size:
            raise UserError(
                f"fresh has batch_size={size}, but source has {self.recorded.batch_size}: give both the same"
            )
        if self.online is not None and self.online.mixture is not None and self.start is self.reference is None:
            raise UserError(
                f"mixture is {self.online.mixture}, but there is no reference to mix with: set start or reference, or "
                "leave it out"
            )

        self._check_moving()

    def _check_moving(self) -> None:
        """Raises UserError if the settings do not allow a moving reference."""
        moving = f"reference_every is {self.reference_every}"
        if self.reference_every is None:
            if self.reference_alpha != 1:
                raise UserError(f"reference_alpha is {self.reference_alpha}, but reference_every is not set: set both")
        elif self.kind != POLICY:
            raise UserError(f"{moving}: a preference model has no reference, leave it out")
        elif self.start is self.reference is None:
            raise UserError(f"{moving}, but there is no reference: set start or reference to the folder of a run")
        elif self.reference_log_probs == "stored":
            raise UserError(
                f"{moving} and reference_log_probs is 'stored', but stored log-probs are of a fixed reference: leave "
                "one of the two out"
            )
        elif (
            self.online is not None
            and self.online.mixture is not None
            and self.reference_every % self.online.steps_per_draw
        ):
            raise UserError(
                f"{moving} and steps_per_draw is {self.online.steps_per_draw}: the steps of a draw share the mixture's "
                "reference, so set reference_every to a multiple of steps_per_draw"
            )
        elif self.adapter.rank is not None and self.reference is not None:
            raise UserError(f"{moving}, and with adapters a moving reference begins at start: leave reference out")

    @property
    def recorded(self) -> DatasetConfig:
        """The datasets of the source: its examples, or its prompts."""
        return recorded(self.source)

    @property
    def online(self) -> OnlineConfig | None:
        """The source of fresh samples, if there is one."""
        return next((each for each in (self.source, self.fresh) if isinstance(each, OnlineConfig)), None)


def recorded(source: SourceConfig) -> DatasetConfig:
    """The datasets of a source: its examples, or its prompts."""
    return source.prompts if isinstance(source, OnlineConfig) else source
