"""Facts about the folders that a job reads, even before they exist: the networks of runs, and the datasets' lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

from alignment_gap import checks
from alignment_gap.checkpoints import Network, agreed_model, check_policy, find_checkpoint, known_network, read_network
from alignment_gap.configuration import flatten, to_dict
from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.dataset import CARD
from alignment_gap.data.tasks.prepare import VALIDATION, PrepareConfig
from alignment_gap.data.text.vocabulary import POSTS
from alignment_gap.errors import UserError
from alignment_gap.folders import at
from alignment_gap.jobs.assembly import BatchShape
from alignment_gap.jobs.compose import ComposeConfig
from alignment_gap.jobs.config import POLICY, JobConfig, OnlineConfig, SourceConfig, recorded
from alignment_gap.jobs.folder import Job
from alignment_gap.jobs.generate import GenerateConfig
from alignment_gap.jobs.label import LabelConfig
from alignment_gap.jobs.served import REFERENCE_LOG_PROBS, SAMPLER_LOG_PROBS, needs_reference
from alignment_gap.judges import REWARDS, JudgeConfig, is_model
from alignment_gap.models import ModelConfig, make_policy, sizes

# Stand-ins for the marker ids of a preference model, which come from a vocabulary; no program depends on them.
MARKERS = (2, 3, 4, 5, 6)

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Overrides:
    """Settings that replace those of a job and its folders in a plan; None keeps the job's own.

    Attributes:
      model: size of the policy by name, such as t5_xxl or palm_8b.
      judge: size of the judge's network by name.
      networks: FOLDER=SIZE, separated by commas; the sizes of networks by folder, for folders that are not there yet.
        They go before `model` and `judge`.
      batch: prompts in a step, over all devices.
      prompt_length: tokens of a prompt.
      response_length: tokens of a response.
      examples: examples of a dataset that is not there yet.
      microbatches: number of parts of a batch; their gradients are summed.
      layout: sharding of networks and batches: data, fsdp, tensor, fsdp_tensor or sequence.
      slices: number of slices of the topology; the data-centre network joins them.
      optimizer: one of `training.optimizers.NAMES`.
      adapter_rank: rank of the low-rank adapters; the plan then trains them instead of all parameters.
      base_dtype: dtype of the adapters' base: int8, or that of the computation.
      remat: what the backward pass recomputes: none, dots or full.
      dtype: precision of the computation: float32 or bfloat16.
    """

    model: str | None = None
    judge: str | None = None
    networks: tuple[str, ...] = ()
    batch: int | None = None
    prompt_length: int | None = None
    response_length: int | None = None
    examples: int | None = None
    microbatches: int | None = None
    layout: str | None = None
    slices: int | None = None
    optimizer: str | None = None
    adapter_rank: int | None = None
    base_dtype: str | None = None
    remat: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError if a number is out of range, or `networks` has another form or an unknown size."""
        checks.at_least(self, 1, "batch", "prompt_length", "response_length", "examples")
        for each in self.networks:
            if not all(each.rpartition("=")):
                raise UserError(f"networks has {each!r}: give FOLDER=SIZE, such as imported/t5_xxl=t5_xxl")
            try:
                sizes.get(each.rpartition("=")[2])
            except UserError as error:
                raise UserError(f"networks has {each}: {error}") from error

    def size_of(self, folder: str) -> str | None:
        """The size that `networks` gives a folder; None if it is not among them."""
        return {path: size for path, _, size in (each.rpartition("=") for each in self.networks)}.get(folder)

    def check_folders(self, configs: Iterable[Any]) -> None:
        """Raises UserError if `networks` has a folder that none of the jobs' configs names."""
        values = (value for config in configs for value in flatten(to_dict(config)).values())
        texts = (each for value in values for each in (value if isinstance(value, tuple) else (value,)))
        named = {part.strip() for text in texts if isinstance(text, str) for part in text.split(",")}
        for folder, *_ in (each.rpartition("=") for each in self.networks):
            if folder not in named:
                near = get_close_matches(folder, named, n=1)
                remedy = f"did you mean {near[0]}?" if near else "give a folder as the job writes it"
                raise UserError(f"networks has {folder}, which no job names: {remedy}")

    def applied(self, job: JobConfig) -> JobConfig:
        """The job with these settings; raises UserError if the job refuses one of them."""
        mesh = _replaced(job.mesh, layout=self.layout, slices=self.slices)
        optimizer = _replaced(job.optimizer, name=self.optimizer)
        adapter = _replaced(job.adapter, rank=self.adapter_rank, base_dtype=self.base_dtype)
        return _replaced(job, mesh=mesh, optimizer=optimizer, adapter=adapter, microbatches=self.microbatches)


def _replaced(config: Config, **changes: Any) -> Config:
    """The dataclass with the changes, except those that are None."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)  # type: ignore[type-var]


class Contents(NamedTuple):
    """The sizes of a dataset: the longest prompt, responses per prompt, the longest response; its arrays and examples.

    `examples` is None if their number is not known.
    """

    prompt: int
    samples: int
    response: int
    fields: tuple[str, ...] = ()
    examples: int | None = None


@dataclasses.dataclass(frozen=True)
class Known:
    """Facts about folders: from the folders, from the jobs that will make them, or from the user.

    Attributes:
      jobs: the jobs of a graph.
      given: the user's settings; they take precedence over folders and jobs.
    """

    jobs: Sequence[Job] = ()
    given: Overrides = Overrides()

    def trained(self, job: JobConfig) -> Network:
        """The network that a job trains, in the user's size if given; raises UserError if its start holds another."""
        return self._trained(job, self.given.model)

    def _trained(self, job: JobConfig, size: str | None) -> Network:
        network = Network(job.kind, markers=() if job.kind == POLICY else MARKERS)
        if job.adapter.rank is not None:
            network = dataclasses.replace(network, adapter=job.adapter, base=job.start)
        if job.start is None and job.model is None and size is None:
            raise UserError(
                "the command names no model: give --model, or the gin files of a job and of its model, such as "
                "--gin_file=gin/runs/sft.gin --gin_file=gin/models/t5_tiny.gin"
            )
        model, start = job.model, None
        if job.model is None:
            start = self.run(str(job.start), job.start_step)
        elif size is None and job.start is not None and self._is_here(job.start):
            start = read_network(find_checkpoint(at(job.start), job.start_step))
        if start is not None:
            if job.kind != "bradley_terry":
                check_policy(start, str(job.start))
            model = agreed_model(job.model, start, str(job.start))
            markers = network.markers if start.head is None else ()
            network = dataclasses.replace(network, markers=markers, head=start.head)
        return self._computed(network, size or model)

    def _is_here(self, path: str) -> bool:
        """Whether a folder exists, and neither the user nor a job of the graph says what it will hold."""
        return self.given.size_of(path) is None and self._maker(path) is None and at(path).exists()

    def run(self, path: str, step: int | None = None) -> Network:
        """The network of a run's folder."""
        return self._network(path, step, Network(), self.given.model, "--model")

    def judge_of(self, config: JudgeConfig) -> Network | None:
        """The network of a judge; None for a judge on the host."""
        if config.judge is None or not is_model(config.judge):
            return None
        usual = Network("bradley_terry" if config.labels == REWARDS else "pairwise", markers=MARKERS)
        return self._network(config.judge, config.step, usual, self.given.judge, "--judge")

    def shape(self, source: SourceConfig) -> BatchShape:
        """The largest batch of a source."""
        config, (prompt, samples, response, *_) = recorded(source), self.contents(source)
        prompt, response = config.prompt_length or prompt, config.response_length or response
        if isinstance(source, OnlineConfig):
            samples, response = source.kept, source.response_length or response
        given, shape = self.given, BatchShape(config.batch_size, prompt, samples, response)
        return _replaced(shape, batch=given.batch, prompt=given.prompt_length, response=given.response_length)

    def contents(self, source: SourceConfig) -> Contents:
        """The contents of all datasets of a source together."""
        return self._together((recorded(source).folder or "").split(","))

    def _together(self, folders: Sequence[str]) -> Contents:
        each = [self._contents(folder.strip()) for folder in folders]
        prompt, samples, response = (max(sizes) for sizes in zip(*(found[:3] for found in each), strict=True))
        known = [found.examples for found in each if found.examples is not None]
        return Contents(prompt, samples, response, each[0].fields, sum(known) if len(known) == len(each) else None)

    def _maker(self, path: str) -> Any:
        """The config of the job that makes `path`: its folder, or something in it. None if no job of the graph does."""
        return next((job.config for job in self.jobs if f"{path}/".startswith(f"{job.folder}/")), None)

    def _network(self, path: str, step: int | None, usual: Network, size: str | None, flag: str) -> Network:
        """The network that a folder holds or will hold, in a given size; `usual` if only the size is known."""
        if (named := self.given.size_of(path)) is not None:
            return self._computed(usual, named)
        if isinstance(job := self._maker(path), JobConfig):
            return self._trained(job, size)
        if size is not None:
            return self._computed(usual, size)
        if at(path).exists():
            return self._computed(known_network(find_checkpoint(at(path), step)), None)
        raise UserError(f"{path} is not there yet, so its network is not known: give {flag}, or --networks={path}=SIZE")

    def _computed(self, network: Network, model: ModelConfig | str | None) -> Network:
        """The network with another model and precision; raises UserError if its settings do not fit together."""
        model = sizes.get(model) if isinstance(model, str) else model or network.model
        model = _replaced(model, remat=self.given.remat, dtype=self.given.dtype)
        make_policy(model)
        network = dataclasses.replace(network, model=model)
        _ = network.adapters  # Raises if the network cannot have these adapters.
        return network

    def _contents(self, path: str) -> Contents:
        if (at(path) / CARD).exists():
            card = open_dataset(path).card
            lengths = card.max_prompt_length, card.responses_per_prompt, card.max_response_length
            return Contents(*lengths, card.fields, card.count)
        made = self._maker(path)
        if made is not None:
            return self._contents_made(made, path)
        prompt, response = self.given.prompt_length, self.given.response_length
        if prompt is None or response is None:
            what = path or "the dataset"
            raise UserError(
                f"{what} is not there yet, so its lengths are not known: give --prompt_length and --response_length"
            )
        return Contents(prompt, 2, response, examples=self.given.examples)

    def _contents_made(self, config: Any, path: str) -> Contents:
        """The contents of the dataset that a job will make; `path` is the job's folder, or one inside it."""
        if isinstance(config, PrepareConfig):
            lengths, examples = (config.limits.prompt_length, 2, config.limits.response_length), self.given.examples
            if config.source.location == POSTS:
                posts = config.source.posts
                examples = posts.validation_pairs if path.endswith(f"/{VALIDATION}") else posts.pairs
            return Contents(*lengths, examples=examples)
        if isinstance(config, LabelConfig):
            return self._contents(str(config.dataset))
        if isinstance(config, ComposeConfig):
            found = self._together(config.datasets)
            return found._replace(examples=at_most(found.examples, config.limit))
        if isinstance(config, GenerateConfig):
            found, samples = self._contents(str(config.prompts)), config.each * len(config.policies)
            response, examples = config.response_length or found.response, at_most(found.examples, config.limit)
            return Contents(found.prompt, samples, response, examples=examples)
        shape = self.shape(config.online)  # The recorded stream of an online run.
        reference = (REFERENCE_LOG_PROBS,) if needs_reference(config, config.loss.function(), ()) else ()
        examples = config.steps and config.steps * shape.batch
        return Contents(shape.prompt, shape.samples, shape.response, (SAMPLER_LOG_PROBS, *reference), examples)


def at_most(examples: int | None, limit: int | None) -> int | None:
    """The examples of a dataset that is cut to a limit; None if their number is not known.

    A dataset may hold fewer examples than a limit, so the limit alone is not known to be their number.
    """
    return examples if limit is None or examples is None else min(examples, limit)
