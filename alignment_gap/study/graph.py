"""Builds the graph of a study's jobs from its config, as a pure function. A user could run the same jobs by hand.

For every seed: prepare -> SFT -> golden model -> D_golden -> proxy -> arms -> opponents -> evaluations.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignment_gap import losses
from alignment_gap.checks import nearest
from alignment_gap.configuration import differences, flatten
from alignment_gap.data.text.vocabulary import POSTS
from alignment_gap.errors import UserError
from alignment_gap.folders import AnyPath, at
from alignment_gap.jobs.baselines import BASELINES, BaselinesConfig
from alignment_gap.jobs.compose import COMPOSE, ComposeConfig
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, SourceConfig
from alignment_gap.jobs.evaluate import EVALUATE, EvaluateConfig
from alignment_gap.jobs.folder import Job, Kind
from alignment_gap.jobs.generate import GENERATE, GenerateConfig
from alignment_gap.jobs.label import LABEL, LabelConfig
from alignment_gap.jobs.prepare import PREPARE
from alignment_gap.jobs.record import RECORD
from alignment_gap.jobs.reference import REFERENCE, ReferenceConfig
from alignment_gap.jobs.train import TRAIN
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import DecoderConfig, T5Config
from alignment_gap.study.analysis import ORIGIN
from alignment_gap.study.arms import GOLDEN, Arm, Branch, arms_of, file_word
from alignment_gap.study.config import HELDOUT, OWN, STREAM, PreferenceModelConfig, SftConfig, StudyConfig
from alignment_gap.training import OptimizerConfig

JOBS = "jobs"
# Raised when a default changes, or when the same settings give other results, so that old folders are not used again.
FORMAT = 4
# Number of pairs that measure a judge's accuracy.
JUDGED_PAIRS = 1000
# The measurement that shows how well the golden model predicts people.
GOLDEN_HELD_OUT = "golden, held-out human labels"


@dataclasses.dataclass(frozen=True)
class Run:
    """One policy of a study, and where its checkpoints are measured.

    Attributes:
      arm: name of the arm; "sft" for the policy that arms start from. An arm without training has SFT's best of n.
      loss: name of the loss.
      beta: regularisation; nan if the loss has none.
      learning_rate: learning rate of the run.
      steps_factor: its number of steps, as a multiple of the online steps.
      evaluation: the job that measures its checkpoints.
    """

    arm: str
    loss: str
    beta: float
    learning_rate: float
    steps_factor: int
    evaluation: Job


@dataclasses.dataclass(frozen=True)
class SeedJobs:
    """The inputs of a seed's report.

    Attributes:
      seed: the seed.
      golden_pairs: the training pairs of D_golden.
      judges: the jobs that measure golden model and proxy, by the name of the measurement.
      runs: the SFT policy, the golden policy, and all arms.
      proxy: the jobs that measure the proxy as a classifier, by the kind of pairs, if policies classify them too.
      baselines: the job that measures the baselines of the golden model; None if there is none.
    """

    seed: int
    golden_pairs: AnyPath
    judges: Mapping[str, Job]
    runs: tuple[Run, ...]
    proxy: Mapping[str, Job]
    baselines: Job | None = None


@dataclasses.dataclass(frozen=True)
class StudyGraph:
    """All jobs of a study, each after the jobs that it needs; and the inputs of the report."""

    jobs: tuple[Job, ...]
    seeds: tuple[SeedJobs, ...]

    def job(self, name: str) -> Job:
        """The job with this name; raises UserError if there is none."""
        names = {job.name: job for job in self.jobs}
        if name not in names:
            raise UserError(f"the study has no job {name!r}: {nearest(name, names)}")
        return names[name]


def study_graph(config: StudyConfig, root: AnyPath) -> StudyGraph:
    """The graph of a study whose jobs' folders are in `root`; it runs nothing and reads no file.

    Raises:
      UserError: a job refuses a setting.
    """
    builders = [_Seed(config, seed, root) for seed in range(config.seed, config.seed + config.seeds)]
    seeds = tuple(builder.build() for builder in builders)
    return StudyGraph(tuple(job for builder in builders for job in builder.jobs), seeds)


def takes_beta(loss: str, place: str) -> bool:
    """Tells whether a loss has the setting beta.

    Raises:
      UserError: the loss is unknown. The message names `place`, the setting or the arm that has it.
    """
    try:
        return "beta" in inspect.signature(losses.get(loss)).parameters
    except ValueError as error:
        raise UserError(f"{place} has {loss!r}: {error}") from error


class Setting(NamedTuple):
    """The setting of a run: loss, beta (nan if the loss has none), learning rate, and multiple of the online steps."""

    loss: str
    beta: float
    learning_rate: float
    steps_factor: int = 1


Trained = tuple[Arm, Setting, Job]


class _Seed:
    """Builds the jobs of one seed in order."""

    def __init__(self, config: StudyConfig, seed: int, root: AnyPath) -> None:
        self.config, self.seed, self.root = config, seed, root
        self.jobs: list[Job] = []
        self.human = self._prepared()
        base, own = config.base, (config.policy, config.sft)
        tuned = base and (base.model, base.sft or dataclasses.replace(config.sft, start=None))
        self.base = self._sft("base", *tuned) if tuned else self._sft("sft", *own)
        self.sft = self.base if tuned in (None, own) else self._sft("sft", *own)
        self.golden = self._preference_model("golden", config.golden, self.human / "train")
        # D_golden: the human pairs, relabelled.
        self.golden_pairs, self.golden_validation = (
            self._label(f"relabelled-{split}", self.human / split) for split in ("train", "validation")
        )
        self.proxy = self._preference_model("proxy", config.proxy, self.golden_pairs)
        self.proxies: dict[int, AnyPath] = {}

    def build(self) -> SeedJobs:
        """Adds all jobs of the seed; judges are measured before the arms, because the arms take longest."""
        config, arms = self.config, self.config.arms
        golden_model, proxy_model = (self.golden, config.golden), (self.proxy, config.proxy)
        judges = {
            GOLDEN_HELD_OUT: self._evaluate_judge("golden", *golden_model, self.human / "validation"),
            "proxy, its training pairs": self._evaluate_judge("proxy-train", *proxy_model, self.golden_pairs),
            "proxy, held-out pairs": self._evaluate_judge("proxy-validation", *proxy_model, self.golden_validation),
        }
        rate = config.base and config.base.learning_rate
        setting = Setting("ipo", arms.beta, rate or arms.optimizer.learning_rate)
        golden = self._train_arm(GOLDEN, setting, {})
        opponents = (f"golden={self._opponent('golden', golden.folder)}", f"sft={self._opponent('sft', self.sft)}")
        trained = [(GOLDEN, setting, golden)]
        for number, loss in enumerate(arms.losses):
            trained += self._train_arms(loss, arms_of((*arms.names, *arms.further) if number == 0 else arms.names))
        for labels, run in self.proxies.items():
            judge = self._evaluate_judge(f"proxy-{labels}", run, config.proxy, self.golden_validation)
            judges[f"proxy of {labels:,} labels, held-out pairs"] = judge
        proxy = {HELDOUT: judges["proxy, held-out pairs"]} if HELDOUT in config.evaluation.classified else {}
        classified = [f"{HELDOUT}={self.golden_validation}"] * len(proxy)
        if STREAM in config.evaluation.classified:
            stream = self._stream(trained)
            classified.append(f"{STREAM}={stream}")
            proxy[STREAM] = self._evaluate_judge("proxy-stream", *proxy_model, stream)
        against = opponents, tuple(classified)
        origin = self._evaluate_policy("sft", self.sft, (config.sft.steps,), self.sft, *against)
        runs = [Run(ORIGIN, "sft", math.nan, math.nan, 1, origin)]
        for arm, (loss, beta, rate, factor), job in trained:
            name = job.name.removeprefix(f"seed{self.seed}-")
            sft = self.base if arm is GOLDEN else self.sft
            evaluation = self._evaluate_policy(name, job.folder, job.config.checkpoint_steps, sft, *against)
            runs.append(Run(arm.name, loss, beta, rate, factor, evaluation))
        for arm in (arm for arm in arms_of((*arms.names, *arms.further)) if arm.best_of):
            settings = {"best_of": arm.best_of, "best_by": str(self.proxy), "own_labels": None}
            evaluation = self._evaluate_policy(
                arm.name, self.sft, (config.sft.steps,), self.sft, opponents, (), **settings
            )
            runs.append(Run(arm.name, arm.loss or arms.losses[0], math.nan, math.nan, 1, evaluation))
        return SeedJobs(self.seed, self.golden_pairs, judges, tuple(runs), proxy, self._baselines())

    def number(self, name: str) -> int:
        """A random seed below 2**32 for the job with this name."""
        return zlib.crc32(f"{self.seed} {name}".encode())

    def _add(self, name: str, kind: Kind, config: Any, also: Sequence[Job] = ()) -> Job:
        """Adds a job; its folder's name has a digest of its settings, which include the names of its input folders.

        It needs the jobs of these folders, and those in `also`.
        """
        settings = flatten(differences(config))
        effective = {key: value for key, value in settings.items() if key not in kind.without_effect}
        content = json.dumps({"format": FORMAT, "kind": kind.name, "settings": effective}, sort_keys=True)
        root = json.dumps(f"{self.root}/")[1:-1]
        key = hashlib.sha256(content.replace(root, "").encode()).hexdigest()[:12]
        needs = tuple(job for job in self.jobs if job in also or f"{root}{job.folder.name}" in content)
        job = Job(f"seed{self.seed}-{name}", kind, config, self.root / f"seed{self.seed}-{name}-{key}", needs)
        self.jobs.append(job)
        return job

    def _prepared(self) -> AnyPath:
        """The folder of the human pairs, with train/ and validation/."""
        if self.config.prepared is not None:
            return at(self.config.prepared)
        source = self.config.task.source
        if source.location == POSTS:
            source = dataclasses.replace(source, posts=dataclasses.replace(source.posts, seed=self.seed))
        task = dataclasses.replace(self.config.task, seed=self.seed, source=source)
        return self._add("data", PREPARE, task).folder

    def _train(
        self, name: str, source: SourceConfig, optimizer: OptimizerConfig, also: Sequence[Job] = (), **settings: Any
    ) -> Job:
        config = self.config
        job = JobConfig(
            source=source,
            optimizer=optimizer,
            seed=self.number(name),
            microbatches=config.microbatches,
            mesh=config.mesh,
            **({"checkpoint_every": config.checkpoint_every} | settings),
        )
        return self._add(name, TRAIN, job, also)

    def _sft(self, name: str, model: T5Config | DecoderConfig | None, sft: SftConfig) -> AnyPath:
        """Adds supervised fine-tuning; both responses of every pair are targets."""
        pooled = ",".join(map(str, (self.human / "train", *sft.also)))
        source = DatasetConfig(pooled, weights=sft.weights, batch_size=sft.batch_size, buckets=sft.buckets)
        settings: dict[str, Any] = {"steps": sft.steps, "model": model, "start": sft.start, "loss": LossConfig("sft")}
        return self._train(name, source, sft.optimizer, **settings).folder

    def _preference_model(self, name: str, model: PreferenceModelConfig, pairs: AnyPath) -> AnyPath:
        network = self.config.base.model if self.config.base else self.config.policy
        if model.start == ORIGIN and model.model not in (None, network):
            whose = "base" if self.config.base else "policy"
            raise UserError(
                f"{name}.model differs from the {whose}, so it cannot start from the SFT {whose}: leave it out, or set "
                f"{name}.start to None"
            )
        source = DatasetConfig(str(pairs), batch_size=model.batch_size, buckets=model.buckets)
        start = str(self.base) if model.start == ORIGIN else model.start
        settings: dict[str, Any] = {"kind": model.kind, "model": model.model, "start": start, "steps": model.steps}
        return self._train(name, source, model.optimizer, **settings).folder

    def _proxy_of(self, labels: int) -> AnyPath:
        """A proxy trained on this number of the golden model's labels; added only once."""
        if labels not in self.proxies:
            config = ComposeConfig((str(self.golden_pairs),), limit=labels, seed=self.number(f"labels {labels}"))
            pairs = self._add(f"labels-{labels}", COMPOSE, config).folder
            self.proxies[labels] = self._preference_model(f"proxy-{labels}", self.config.proxy, pairs)
        return self.proxies[labels]

    def _label(self, name: str, pairs: AnyPath) -> AnyPath:
        """Pairs with the golden model's hard labels; ties stay ties."""
        config = LabelConfig(
            str(pairs),
            JudgeConfig(str(self.golden)),
            buckets=1,
            batch_size=self.config.evaluation.batch_size,
            mesh=self.config.mesh,
        )
        return self._add(name, LABEL, config).folder

    def _train_arms(self, loss: str, arms: Sequence[Arm]) -> list[Trained]:
        """The runs of the arms under a loss; each comes after the arms whose runs it reads."""
        runs: dict[str, AnyPath] = {}
        trained: list[Trained] = []
        # An arm with its own loss is trained once, together with the arms of the first loss.
        for arm in (arm for arm in arms if arm.source and (not arm.loss or loss == self.config.arms.losses[0])):
            for setting in self._settings(arm, arm.loss or loss):
                job = self._train_arm(arm, setting, runs)
                trained.append((arm, setting, job))
                runs.setdefault(arm.name, job.folder)
        return trained

    def _settings(self, arm: Arm, loss: str) -> list[Setting]:
        """The settings at which an arm is trained under a loss."""
        arms = self.config.arms
        has_beta = takes_beta(loss, f"the arm {arm.name}" if arm.loss else "arms.losses")
        if arm.name not in arms.swept:
            beta = arm.beta_factor * arms.beta if has_beta else math.nan
            return [Setting(loss, beta, arms.optimizer.learning_rate)]
        betas = arms.offline_betas if has_beta else (math.nan,)
        is_first = arm.name == arms.swept[0] and loss == arms.losses[0]
        factors = arms.offline_steps if is_first else arms.offline_steps[:1]
        swept = itertools.product(betas, arms.offline_learning_rates, factors)
        return [Setting(loss, *each) for each in swept]

    def _train_arm(self, arm: Arm, setting: Setting, runs: Mapping[str, AnyPath]) -> Job:
        """Adds a run of an arm; online and offline runs differ only in their source. SFT is start and reference."""
        arms, (loss, beta, rate, factor) = self.config.arms, setting
        settings = {} if math.isnan(beta) else {"beta": beta}
        words = [arm.name, file_word(loss), *(f"beta{value:g}" for value in settings.values()), f"lr{rate:g}"]
        name = "-".join([*words, f"steps{factor}x"] if factor > 1 else words)
        steps = tuple(factor * step for step in arms.checkpoint_steps)
        sft, batch_size = self.sft, arms.batch_size
        if arm is GOLDEN and self.config.base is not None:
            sft, batch_size = self.base, self.config.base.batch_size or batch_size
        branch = Branch(
            golden=self.golden,
            proxy=self.proxy,
            sft=sft,
            golden_pairs=self.golden_pairs,
            batch_size=batch_size,
            sampler=self.config.sampler,
            checkpoint_steps=arms.checkpoint_steps,
            runs=runs,
            proxy_of=self._proxy_of,
            pairs=functools.partial(self._sampled_pairs, loss),
        )
        source, fresh = arm.sources(branch)
        start = arms.start if arm is not GOLDEN or self.config.base is None else None
        # The record of a run already has the log-probs of its reference.
        is_record = isinstance(source, DatasetConfig) and at(source.folder or "").parent in runs.values()
        reads_reference = any(name.startswith("ref_") for name in losses.arrays(losses.get(loss)))
        is_scored = arms.stored_reference and reads_reference and source == branch.dataset(self.golden_pairs)
        return self._train(
            name,
            source,
            dataclasses.replace(arms.optimizer, learning_rate=rate),
            also=[self._scored()] if is_scored else [],
            reference_log_probs="stored" if is_scored else "auto",
            fresh=fresh,
            loss=LossConfig(loss, settings),
            start=start or str(sft),
            reference=str(sft) if start and not is_record else None,
            steps=steps[-1],
            checkpoint_every=steps[-1],
            checkpoint_steps=steps,
        )

    def _scored(self) -> Job:
        """Stores the log-probs of D_golden under SFT; added only once."""
        if made := [job for job in self.jobs if job.kind is REFERENCE]:
            return made[0]
        config = ReferenceConfig(
            str(self.golden_pairs),
            str(self.sft),
            batch_size=self.config.evaluation.batch_size,
            mesh=self.config.mesh,
        )
        return self._add("reference", REFERENCE, config)

    def _sampled_pairs(self, loss: str, name: str, policies: Sequence[AnyPath]) -> AnyPath:
        """Pairs from policies for as many prompts as an arm trains on, with golden labels; added only once."""
        arms, name = self.config.arms, f"pairs-{name}-{file_word(loss)}"
        made = [job for job in self.jobs if job.name == f"seed{self.seed}-{name}"]
        if made:
            return made[0].folder
        return self._generate(
            name,
            policies,
            samples=2 if len(policies) == 1 else 1,
            judge=JudgeConfig(str(self.golden)),
            limit=arms.batch_size * arms.checkpoint_steps[-1],
            seed=self.number(name),
        )

    def _opponent(self, name: str, run: AnyPath) -> AnyPath:
        """One response of a policy to every evaluation prompt; all checkpoints are compared with it."""
        prompts, seed = self.config.evaluation.prompts, self.number(f"opponent {name}")
        return self._generate(f"opponent-{name}", [run], samples=1, limit=prompts, seed=seed)

    def _generate(self, name: str, policies: Sequence[AnyPath], **settings: Any) -> AnyPath:
        """Responses of policies to the first prompts of D_golden."""
        config = GenerateConfig(
            str(self.golden_pairs),
            tuple(map(str, policies)),
            sampler=self.config.sampler,
            buckets=1,
            batch_size=self.config.evaluation.batch_size,
            mesh=self.config.mesh,
            **settings,
        )
        return self._add(name, GENERATE, config).folder

    def _stream(self, trained: Sequence[Trained]) -> AnyPath:
        """Some pairs of D_online, spread over the run under the first loss, with the golden model's labels."""
        online = next((job for arm, _, job in trained if arm.name == "online"), None)
        if online is None:
            raise UserError(f"evaluation.classified has {STREAM!r}, but no arm is named 'online': add it to arms.names")
        size, seed = self.config.evaluation.pairs, self.number("stream")
        chosen = self._add("stream", COMPOSE, ComposeConfig((str(online.folder / RECORD),), limit=size, seed=seed))
        return self._label("stream-relabelled", chosen.folder)

    def _evaluate_policy(
        self,
        name: str,
        run: AnyPath,
        steps: tuple[int, ...],
        reference: AnyPath,
        opponents: tuple[str, ...],
        classified: tuple[str, ...],
        **settings: Any,
    ) -> Job:
        """Measures every checkpoint of a run on the first prompts and the last pairs of D_golden."""
        evaluation = self.config.evaluation
        own_labels = str(self.golden) if OWN in evaluation.classified else None
        return self._evaluate(
            f"evaluation-{name}",
            run,
            steps,
            self.golden_pairs,
            judges=(f"golden={self.golden}", f"proxy={self.proxy}", *evaluation.judges),
            opponents=opponents,
            classified=classified,
            reference=str(reference),
            prompts=evaluation.prompts,
            kl_prompts=evaluation.kl_prompts,
            pairs=evaluation.pairs,
            sampler=self.config.sampler,
            seed=self.number(f"evaluation {name}"),
            **{"own_labels": own_labels} | settings,
        )

    def _evaluate_judge(self, name: str, run: AnyPath, model: PreferenceModelConfig, pairs: AnyPath) -> Job:
        """Measures how often a judge agrees with labels and with the additional judges."""
        judges = self.config.evaluation.judges
        return self._evaluate(f"judge-{name}", run, (model.steps,), pairs, judges=judges, pairs=JUDGED_PAIRS)

    def _baselines(self) -> Job | None:
        """Measures simple baselines on the human labels that also measure the golden model."""
        if not self.config.evaluation.baselines:
            return None
        pairs = str(self.human / "train"), str(self.human / "validation")
        return self._add("judge-baselines", BASELINES, BaselinesConfig(*pairs, JUDGED_PAIRS))

    def _evaluate(self, name: str, run: AnyPath, steps: tuple[int, ...], dataset: AnyPath, **settings: Any) -> Job:
        config = EvaluateConfig(
            str(run),
            steps,
            str(dataset),
            batch_size=self.config.evaluation.batch_size,
            mesh=self.config.mesh,
            **settings,
        )
        return self._add(name, EVALUATE, config)
