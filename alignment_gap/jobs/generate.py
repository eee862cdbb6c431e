"""A dataset of fresh responses to the prompts of another: of one policy, or of two against each other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment_gap import checks
from alignment_gap.checkpoints import Network, check_vocabulary, find_checkpoint, known_network
from alignment_gap.checkpoints.digest import params_digest
from alignment_gap.data.batches import PreferenceBatch, choose_buckets
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
from alignment_gap.sampling import SamplerConfig, Samples, make_generate
from alignment_gap.sharding import LogicalMesh, MeshConfig, make_mesh, on_every_process, put_replicated
from alignment_gap.training import load_policy

# (prompt_ids, prompts, prompt_lengths) -> samples, on the devices.
DrawRows = Callable[..., Samples]


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Responses to generate.

    Attributes:
      prompts: the dataset whose prompts are answered, each once.
      policies: folder of a policy's run or checkpoint, or of two: the responses of the first come first.
      judge: who scores the responses; without one all scores are 0.5.
      samples: responses of each policy to a prompt; None for 2 of one policy, 1 of each of two.
      limit: prompts that are answered, the first of the dataset; None for all.
      sampler: how tokens are drawn.
      response_length: most tokens of a response; None for the longest of the dataset.
      seed: of the samples.
      vocabulary: where the dataset's vocabulary is, if it has moved.
      buckets: lengths that prompts are padded to at most, chosen from theirs.
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
        """Raises UserError where a setting is out of its range, or two do not go together."""
        checks.at_least(self, 1, "samples", "limit", "response_length", "buckets", "batch_size")
        checks.within(self, 0, SEED_LIMIT - 1, "seed")
        if len(self.policies) > 2:
            raise UserError(f"policies has {len(self.policies)} folders: give one policy, or two with a comma between")
        if self.judge.judge is not None and self.each * len(self.policies) == 1 and self.judge.labels != "rewards":
            raise UserError("one response a prompt cannot be compared: set samples to 2 or more, or give two policies")

    @property
    def each(self) -> int:
        """Responses of each policy to a prompt."""
        return self.samples or (2 if len(self.policies) == 1 else 1)


def open_generation(config: GenerateConfig) -> Opened:
    """Opens prompts, policies and judge; raises UserError where one of them cannot be used."""
    if not config.policies:
        raise UserError("policies is not set: give the folder of a policy, or of two with a comma between")
    dataset = open_checked(config.prompts, "prompts")
    mesh = make_mesh(config.mesh)
    response = config.response_length or dataset.card.max_response_length
    numbers = distinct_prompts(dataset, config.limit)
    # Nothing is known of the samples but how long they may be.
    lengths = np.column_stack([lengths_of(dataset)[numbers, 0], np.full(len(numbers), response)])
    shapes = choose_buckets(lengths, config.buckets, (dataset.card.max_prompt_length, response))
    batching = Batching(mesh, config.batch_size, shapes)
    eos_id = find_vocabulary(dataset, config.vocabulary).eos_id
    draws: list[DrawRows] = []
    facts: dict[str, Any] = {}
    for place, folder in enumerate(config.policies):
        policy, params = open_policy(folder, dataset, mesh)
        key = jax.random.fold_in(jax.random.key(config.seed), place)
        settings = {"samples": config.each, "max_length": response, "eos_id": eos_id, "config": config.sampler}
        draws.append(drawing(policy, params, mesh, key, **settings))
        facts |= {f"policy {place}": folder, f"policy {place}.digest": params_digest(params)}
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
    """A policy and its parameters; raises UserError where it is none, or of another vocabulary than the dataset."""
    network = policy_network(folder, step)
    on_every_process(lambda: check_vocabulary(network, dataset.card.vocabulary_digest, folder, str(dataset.folder)))
    return load_policy(folder, mesh, step)


def policy_network(folder: str, step: int | None) -> Network:
    """What a policy's checkpoint says of itself; raises UserError where the folder holds none."""
    network = on_every_process(lambda: known_network(find_checkpoint(at(folder), step)))
    if network.kind != POLICY:
        raise UserError(f"{folder} holds a preference model: give the folder of a policy")
    return network


def drawing(policy: Policy, params: Any, mesh: LogicalMesh, key: jax.Array, **settings: Any) -> DrawRows:
    """What draws samples for rows of prompts, with one key for all of them; `settings` are those of `make_generate`."""
    generate = make_generate(policy, mesh, **settings)
    return functools.partial(generate, params, *put_replicated((key, jnp.int32(0)), mesh))


def sample_examples(examples: Iterable[Example], draws: Sequence[DrawRows], batching: Batching) -> Iterator[Example]:
    """Every example's prompt with fresh responses, those of the first of `draws` before those of the second.

    No response is preferred: scores are 0.5 until `label` says more.
    """

    def responses(batch: PreferenceBatch) -> list[tuple[np.ndarray, ...]]:
        rows = (batch.prompt_ids, batch.prompts, batch.prompt_lengths)
        drawn = [batching.run(draw, rows) for draw in draws]
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
    """The prompt with a response of one token, for an example must have one: what it had may be over the length."""
    return Example(example.prompt_id, example.prompt, (example.prompt[:1],), np.zeros(1, np.float32))


def _settings(config: GenerateConfig, response: int) -> dict[str, Any]:
    sampler = dataclasses.asdict(config.sampler)
    # The number of buckets alters the rounding.
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
