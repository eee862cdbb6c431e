"""Generates a dataset of fresh responses to the prompts of another dataset, from one policy or from two."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from alignment_gap import checks
from alignment_gap.checkpoints import (
    Network,
    check_vocabulary,
    end_ids,
    find_checkpoint,
    known_network,
    tokenizer_of,
)
from alignment_gap.checkpoints.digest import params_digest
from alignment_gap.data.batches import PreferenceBatch, check_token_ids, choose_buckets
from alignment_gap.data.batches.order import SEED_LIMIT
from alignment_gap.data.records import Dataset, Example, lengths_of
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.errors import UserError
from alignment_gap.evaluation.batching import Batching
from alignment_gap.folders import AnyPath, at
from alignment_gap.jobs.compose import distinct_prompts
from alignment_gap.jobs.config import POLICY
from alignment_gap.jobs.folder import MESH, Kind, Opened
from alignment_gap.jobs.label import accounted, label, labels_summary, open_checked
from alignment_gap.jobs.parts import write_parts
from alignment_gap.judges import Judge, JudgeConfig, open_judge
from alignment_gap.models import Policy
from alignment_gap.progress import OpenBar
from alignment_gap.sampling import SamplerConfig, make_generate
from alignment_gap.sharding import LogicalMesh, MeshConfig, make_mesh, on_every_process, put_replicated
from alignment_gap.training import load_policy

# (batching, (prompt_ids, prompts, prompt_lengths)) -> `Samples` as numpy arrays.
DrawRows = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Responses to generate.

    Attributes:
      prompts: the dataset whose prompts are answered; each distinct prompt is answered once.
      policies: folder of a policy's run or checkpoint, or two folders separated by a comma. The responses of the first
        policy come first.
      judge: the judge that scores the responses; without a judge all scores are 0.5.
      samples: responses per prompt from each policy; None for 2 from one policy, or 1 from each of two.
      limit: number of prompts that are answered, the first of the dataset; None for all.
      sampler: how tokens are drawn.
      response_length: maximum tokens of a response; None for the longest in the dataset.
      seed: seed of the samples.
      vocabulary: path of the dataset's vocabulary, if it has moved.
      buckets: maximum number of padded prompt lengths, chosen from the lengths of the prompts.
      batch_size: prompts at a time, over all devices.
      mesh: the device mesh.
    """

    prompts: str | None = None
    policies: tuple[str, ...] = ()
    judge: JudgeConfig = JudgeConfig()
    samples: int | None = None
    limit: int | None = None
    sampler: SamplerConfig = SamplerConfig()
    response_length: int | None = None
    seed: int = 0
    vocabulary: str | None = None
    buckets: int = 4
    batch_size: int = 64
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        """Raises UserError if a setting is out of range, or two settings conflict."""
        checks.at_least(self, 1, "samples", "limit", "response_length", "buckets", "batch_size")
        checks.within(self, 0, SEED_LIMIT - 1, "seed")
        if len(self.policies) > 2:
            raise UserError(f"policies has {len(self.policies)} folders: give one, or two separated by a comma")
        if self.judge.judge is not None and self.each * len(self.policies) == 1 and self.judge.labels != "rewards":
            raise UserError("one response per prompt leaves nothing to compare: set samples to 2, or give two policies")

    @property
    def each(self) -> int:
        """Responses per prompt from each policy."""
        return self.samples or (2 if len(self.policies) == 1 else 1)


def open_generation(config: GenerateConfig) -> Opened:
    """Opens prompts, policies and judge; raises UserError if one of them cannot be used."""
    if not config.policies:
        raise UserError("policies is not set: give the folder of a policy, or two separated by a comma")
    dataset = open_checked(config.prompts, "prompts")
    mesh = make_mesh(config.mesh)
    response = config.response_length or dataset.card.max_response_length
    numbers = distinct_prompts(dataset, config.limit)
    # The lengths of the samples are not known yet, so their maximum is used.
    lengths = np.column_stack([lengths_of(dataset)[numbers, 0], np.full(len(numbers), response)])
    shapes = choose_buckets(lengths, config.buckets, (dataset.card.max_prompt_length, response))
    batching = Batching(mesh, config.batch_size, shapes)
    eos_id = find_vocabulary(dataset, config.vocabulary).eos_id
    draws: list[DrawRows] = []
    facts: dict[str, Any] = {}
    for place, folder in enumerate(config.policies):
        policy, params = open_policy(folder, dataset, mesh)
        key = jax.random.fold_in(jax.random.key(config.seed), place)
        ends = policy_ends(folder, eos_id)
        settings = {"samples": config.each, "max_length": response, "eos_id": ends, "config": config.sampler}
        draws.append(drawing(policy, params, mesh, key, **settings))
        facts |= {f"policy {place}": folder, f"policy {place}.digest": params_digest(params)}
        facts |= ends_facts(f"policy {place}", ends)
    judge = open_judge(config.judge, dataset, mesh) if config.judge.judge is not None else None
    facts |= judge.facts if judge else {}

    def run(folder: AnyPath, open_bar: OpenBar) -> None:
        def make(start: int, stop: int) -> Iterator[Example]:
            sampled = sample_examples((dataset[int(i)] for i in numbers[start:stop]), draws, batching)
            return accounted(label(sampled, judge, batching), judge, folder, start) if judge else sampled

        write_parts(
            folder,
            len(numbers),
            make,
            made_by="generate",
            inputs={"prompts": dataset},
            facts=facts | _settings(config, response),
            open_bar=open_bar,
            scores=_scores_kind(judge, config.each * len(config.policies)),
        )

    return Opened({"prompts.digest": dataset.card.digest, **facts}, run)


def open_policy(folder: str, dataset: Dataset, mesh: LogicalMesh, step: int | None = None) -> tuple[Policy, Any]:
    """A policy and its parameters; raises UserError if it is not a policy, or its vocabulary is not the dataset's."""
    network = policy_network(folder, step)
    on_every_process(lambda: check_vocabulary(network, dataset.card.vocabulary_digest, folder, str(dataset.folder)))
    return load_policy(folder, mesh, step)


def policy_network(folder: str, step: int | None) -> Network:
    """The network in a policy's checkpoint; raises UserError if the folder does not hold a policy."""
    network = on_every_process(lambda: known_network(find_checkpoint(at(folder), step)))
    if network.kind != POLICY:
        raise UserError(f"{folder} holds a preference model: give the folder of a policy")
    return network


def policy_ends(folder: str, eos_id: int, step: int | None = None) -> tuple[int, ...]:
    """The ids that end an answer of a policy: the vocabulary's, then those that the policy's tokenizer files name."""
    return on_every_process(lambda: end_ids(tokenizer_of(find_checkpoint(at(folder), step)), eos_id))


def ends_facts(name: str, ends: tuple[int, ...]) -> dict[str, list[int]]:
    """A fact about a job's input: its end ids beside the vocabulary's, if it has some, because they change samples."""
    return {f"{name}.end_ids": [*ends[1:]]} if ends[1:] else {}


def drawing(policy: Policy, params: Any, mesh: LogicalMesh, key: jax.Array, **settings: Any) -> DrawRows:
    """A function that draws samples for rows of prompts; all calls use one key. `make_generate` takes `settings`.

    Its argument `repeats` says how often each prompt came before, so that it gets new samples each time. It raises
    UserError if a prompt has a token id outside the policy's vocabulary.
    """
    generate = functools.partial(make_generate(policy, mesh, **settings), params, put_replicated(key, mesh))

    def draw(batching: Batching, rows: tuple[np.ndarray, ...], repeats: Sequence[int] | int = 0) -> Any:
        check_token_ids("a prompt", "the policy", policy.config.vocabulary_size, rows[1])
        # A step has keys of its own, so a prompt's repeat counts as a step.
        steps = np.broadcast_to(np.array(repeats, np.int32), rows[0].shape)
        return batching.run(generate, (steps, *rows))

    return draw


def sample_examples(examples: Iterable[Example], draws: Sequence[DrawRows], batching: Batching) -> Iterator[Example]:
    """Every example's prompt with fresh responses: those from `draws[0]`, then those from `draws[1]` if there is one.

    All scores are 0.5 until `label` replaces them.
    """

    def responses(batch: PreferenceBatch) -> list[tuple[np.ndarray, ...]]:
        rows = (batch.prompt_ids, batch.prompts, batch.prompt_lengths)
        drawn = [draw(batching, rows) for draw in draws]
        return [
            tuple(
                tokens[:length]
                for samples in drawn
                for tokens, length in zip(samples.responses[row], samples.lengths[row], strict=True)
            )
            for row in range(len(batch.prompt_ids))
        ]

    for prompt, drawn in batching.each(map(_without_responses, examples), responses):
        scores = np.full(len(drawn), 0.5, np.float32)
        yield dataclasses.replace(prompt, responses=drawn, scores=scores)


def _without_responses(example: Example) -> Example:
    """The prompt with a one-token response, because an example needs one; its own may exceed the maximum length."""
    return Example(example.prompt_id, example.prompt, (example.prompt[:1],), np.zeros(1, np.float32))


def _settings(config: GenerateConfig, response: int) -> dict[str, Any]:
    sampler = dataclasses.asdict(config.sampler)
    # The number of buckets changes the rounding.
    return {
        "samples": config.each,
        "response_length": response,
        **sampler,
        "seed": config.seed,
        "buckets": config.buckets,
    }


def _scores_kind(judge: Judge | None, responses: int) -> str:
    return judge.kind if judge and responses == 2 else "probabilities" if responses == 2 else "rewards"


GENERATE = Kind(
    name="generate",
    command="data generate",
    config=GenerateConfig,
    open=open_generation,
    summary=labels_summary,
    short={"judge.judge": "judge", "sampler.": ""},
    may_change=lambda folder: ("batch_size", "vocabulary", *MESH),
    repairs=True,
)
