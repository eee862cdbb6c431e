"""The programs that a job runs: for updates, sampling, judges and evaluations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from alignment_gap.checkpoints import Network
from alignment_gap.folders import at, whole_path
from alignment_gap.jobs.assembly import BatchShape, Facts, gives_rewards
from alignment_gap.jobs.config import POLICY, DatasetConfig, JobConfig, OnlineConfig
from alignment_gap.jobs.evaluate import EvaluateConfig, named
from alignment_gap.jobs.generate import GenerateConfig
from alignment_gap.jobs.label import LabelConfig
from alignment_gap.jobs.reference import ReferenceConfig
from alignment_gap.jobs.served import check_served, needs_reference, reads_mismatched
from alignment_gap.judges import JudgeConfig
from alignment_gap.models import ModelConfig
from alignment_gap.plan.known import Known, at_most
from alignment_gap.sharding.chips import Topology

# Kinds of programs that draw tokens one after another.
SAMPLES = ("sample", "opponents")


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a job.

    Attributes:
      name: such as "judge golden".
      kind: "update", "score", "sample", "opponents", "judge" or "divergence".
      facts: the network that it runs, and the shape of its batches.
      holds: whether it has parameters of its own, which stay in memory in addition to the policy's.
      labels: the kind of a judge's labels.
      shares: whether its parameters are the base of the policy's adapters, alone or with its own adapters.
      calls: number of its calls in the whole job; None if the number of examples is not known.
      steps: number of steps that one call serves.
    """

    name: str
    kind: str
    facts: Facts
    holds: bool = False
    labels: str = "hard"
    shares: bool = False
    calls: int | None = None
    steps: int = 1

    @property
    def batch(self) -> BatchShape:
        """The shape of the batch."""
        return self.facts.batch

    @property
    def model(self) -> ModelConfig:
        """The config of the policy, or of the policy inside a preference model."""
        return self.facts.network.model

    def with_batch(self, prompts: int) -> Program:
        """The same program with another number of prompts in a step, also in the batch of a second source."""
        batch = dataclasses.replace(self.batch, batch=prompts * self.steps)
        facts = dataclasses.replace(self.facts, batch=batch)
        if facts.fresh is not None:
            facts = dataclasses.replace(facts, fresh=dataclasses.replace(facts.fresh, batch=prompts))
        return dataclasses.replace(self, facts=facts)

    def with_model(self, **settings: Any) -> Program:
        """The same program with other settings of the model."""
        return dataclasses.replace(self, facts=self.facts.with_model(**settings))

    def with_draws(self, steps: int) -> Program:
        """The same program; the sampler of a training job draws for so many steps in a call."""
        if self.kind != "sample":
            return self
        calls = None if self.calls is None else -(-self.calls * self.steps // steps)
        prompts = self.batch.batch // self.steps
        return dataclasses.replace(self, calls=calls, steps=steps).with_batch(prompts)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The programs and devices to plan.

    Attributes:
      job: the training job whose settings the programs use: mesh, loss, optimizer, source.
      programs: the programs; a training job's update comes first.
      topology: the devices.
      search: whether to search for the largest batch that fits.
    """

    job: JobConfig
    programs: tuple[Program, ...]
    topology: Topology
    search: bool = True

    @property
    def batch_unit(self) -> int:
        """Every batch must be a multiple of this: its parts over the devices, times the microbatches."""
        data, fsdp, _ = self.job.mesh.shape(self.topology.devices)
        return data * fsdp * self.job.microbatches


# The training job whose settings the programs use, and the programs.
Planned = tuple[JobConfig, list[Program]]


def programs_of(config: Any, known: Known) -> tuple[JobConfig, tuple[Program, ...]]:
    """The programs of a job, and the training job whose settings they use; no programs if it computes on no device.

    Raises:
      UserError: a fact that the job needs is not known.
    """
    plans: dict[type, Callable[[Any, Known], Planned]] = {
        JobConfig: _training,
        LabelConfig: _labelling,
        ReferenceConfig: _scoring,
        GenerateConfig: _generation,
        EvaluateConfig: _evaluation,
    }
    job, programs = plans.get(type(config), lambda *_: (JobConfig(), []))(config, known)
    return job, tuple(programs)


def _training(config: JobConfig, known: Known) -> Planned:
    """The update first, then the programs that a step runs before it."""
    config = known.given.applied(config)
    online = config.source if isinstance(config.source, OnlineConfig) else None
    facts = Facts(
        known.trained(config),
        known.shape(config.source),
        known.shape(config.fresh) if config.fresh is not None else None,
        fields=() if online else known.contents(config.source).fields,
        rewards=online is not None and gives_rewards(online),
    )
    programs = [Program("update", "update", facts)]
    if facts.network.kind != POLICY:
        return config, [dataclasses.replace(programs[0], calls=_steps(config, known))]
    loss = config.loss.function()
    check_served(config, loss, facts.fields)
    if config.online is not None:
        shape = facts.fresh if config.online is config.fresh and facts.fresh is not None else facts.batch
        programs += _sampling(config.online, dataclasses.replace(facts, batch=shape), known)
    if needs_reference(config, loss, facts.fields):
        is_stored = config.reference_log_probs == "stored" and not isinstance(config.source, OnlineConfig)
        scored = {
            "reference": None if is_stored else facts.batch,
            "reference, fresh": facts.fresh,
            "reference, mismatched": facts.batch if reads_mismatched(loss) else None,
        }
        # With adapters, the reference is their base, unless the job names another.
        is_base = config.adapter.rank is not None and config.reference is None
        # A reference that moves is part of the state, and has adapters if the policy has.
        moves = config.reference_every is not None
        network = facts.network if moves else dataclasses.replace(facts.network, adapter=None)
        scoring = dataclasses.replace(facts, network=network)
        found = [
            (name, dataclasses.replace(scoring, batch=shape)) for name, shape in scored.items() if shape is not None
        ]
        programs += [
            Program(name, "score", each, holds=not (place or is_base or moves), shares=is_base and not moves)
            for place, (name, each) in enumerate(found)
        ]
    steps = _steps(config, known)
    calls = [None if steps is None else -(-steps // program.steps) for program in programs]
    return config, [dataclasses.replace(each, calls=number) for each, number in zip(programs, calls, strict=True)]


def _steps(config: JobConfig, known: Known) -> int | None:
    """The number of steps of a training job; None if it counts epochs of an unknown number of examples."""
    if config.steps is not None:
        return config.steps
    examples, epochs = known.contents(config.source).examples, config.recorded.epochs
    return None if examples is None or epochs is None else epochs * examples // known.shape(config.source).batch


def _calls(shape: BatchShape, *examples: int | None, times: int | None = 1) -> int | None:
    """`times` the number of batches for these examples, each in batches of their own; None if a number is not known."""
    known = [-(-number // shape.batch) for number in examples if number is not None]
    return None if times is None or len(known) < len(examples) else times * sum(known)


def _sampling(online: OnlineConfig, facts: Facts, known: Known) -> list[Program]:
    drawn = dataclasses.replace(facts.batch, samples=online.samples)
    sampling = Program("sampling", "sample", dataclasses.replace(facts, batch=drawn))
    programs, judged = [sampling.with_draws(online.steps_per_draw)], drawn
    if online.against == "mixture":
        one, judged = (dataclasses.replace(drawn, samples=samples) for samples in (1, 2))
        programs.append(Program("opponents", "opponents", dataclasses.replace(facts, batch=one)))
    return programs + _judging("judge", online.judge, judged, known, facts.network)


def _judging(
    name: str,
    judge: JudgeConfig,
    shape: BatchShape,
    known: Known,
    policy: Network | None = None,
    calls: int | None = None,
) -> list[Program]:
    """The program of a judge on the devices; no program for a judge on the host."""
    network = known.judge_of(judge)
    if network is None:
        return []
    network.preference_model()  # Raises if the network is a policy.
    shares = False
    if policy and policy.adapter and network.adapter and network.adapter.base_dtype == policy.adapter.base_dtype:
        # A checkpoint names the whole path of a step's folder as its base, a job names a run's folder.
        ours, its = (whole_path(at(str(each.base))) for each in (policy, network))
        shares = f"{its}/".startswith(f"{ours}/")
    return [Program(name, "judge", Facts(network, shape), True, judge.labels, shares, calls)]


def _labelling(config: LabelConfig, known: Known) -> Planned:
    source = DatasetConfig(config.dataset, batch_size=config.batch_size)
    shape = known.shape(source)
    calls = _calls(shape, known.contents(source).examples)
    return known.given.applied(JobConfig(mesh=config.mesh)), _judging("judge", config.judge, shape, known, calls=calls)


def _scoring(config: ReferenceConfig, known: Known) -> Planned:
    shape, network = known.shape(config.source), config.computed(known.run(str(config.checkpoint), config.step))
    calls = _calls(shape, known.contents(config.source).examples)
    program = Program("reference", "score", Facts(network, shape), holds=True, calls=calls)
    return known.given.applied(JobConfig(mesh=config.mesh)), [program]


def _generation(config: GenerateConfig, known: Known) -> Planned:
    job, shape = _answering(config, config.prompts, config.each, known)
    calls = _calls(shape, at_most(known.contents(job.source).examples, config.limit))
    programs = [
        Program(f"sampling {place}", "sample", Facts(known.run(folder), shape), holds=True, calls=calls)
        for place, folder in enumerate(config.policies)
    ]
    judged = dataclasses.replace(shape, samples=config.each * len(config.policies))
    return job, programs + _judging("judge", config.judge, judged, known, calls=calls)


def _evaluation(config: EvaluateConfig, known: Known) -> Planned:
    """The programs that measure checkpoints. Judges compare each response with those of all opponents."""
    network, run = known.run(str(config.run)), str(config.run)
    job, shape = _answering(config, config.dataset, max(config.best_of, default=1), known)
    pair = dataclasses.replace(shape, samples=2)
    names = {judge: name for name, judge in map(named, config.judges)}
    checkpoints = None if config.steps is None else len(config.steps)
    calls = functools.partial(_calls, shape, times=1 if config.best_of else checkpoints)
    compared = [config.prompts] * len(config.opponents) * max(len(config.best_of), 1)
    programs = list[Program]()
    asked: dict[str, Sequence[int | None]] = dict.fromkeys(names, compared)
    if network.kind != POLICY:
        names = {run: "run"} | names
        asked = {judge: [config.pairs or known.contents(job.source).examples] for judge in names}
    elif config.best_of:
        choices = calls(*[config.prompts] * len(config.best_of))
        programs = [Program("sampling", "sample", Facts(network, shape), holds=True, calls=calls(config.prompts))]
        chooser = _judging("judge, best of n", JudgeConfig(config.best_by), shape, known, calls=choices)
        programs += [dataclasses.replace(each, holds=config.best_by not in names) for each in chooser]
    else:
        answers, pairs = Facts(network, shape), Facts(network, known.shape(job.recorded))
        # Second samples make pairs of the policy's own. The policy and its reference both score all pairs.
        own = [config.kl_prompts] * (config.own_labels is not None)
        scored = 2 * [*[config.pairs] * (1 + len(config.classified)), *own]
        programs = [
            Program("sampling", "sample", answers, holds=True, calls=calls(*[config.prompts] * (1 + len(own)))),
            Program("KL", "divergence", answers, holds=True, calls=calls(config.kl_prompts)),
            Program("classification", "score", pairs, calls=calls(*scored)),
        ]
        if config.own_labels is not None:
            asked[config.own_labels] = [*asked.get(config.own_labels, ()), *own]
    for judge, examples in asked.items():
        name = f"judge {names.get(judge, 'of own samples')}"
        programs += _judging(name, JudgeConfig(judge), pair, known, calls=calls(*examples))
    return job, programs


def _answering(
    config: GenerateConfig | EvaluateConfig, folder: str | None, samples: int, known: Known
) -> tuple[JobConfig, BatchShape]:
    """A training job that samples responses to the prompts of a dataset, and the shape of its batches."""
    prompts = DatasetConfig(folder, batch_size=config.batch_size)
    source = OnlineConfig(prompts, samples, sampler=config.sampler, response_length=config.response_length)
    return known.given.applied(JobConfig(source=source, mesh=config.mesh)), known.shape(source)
