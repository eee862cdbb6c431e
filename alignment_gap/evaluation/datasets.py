"""Datasets that networks make: labels of a preference model, samples of one policy or of two against each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from alignment_gap.data.batch import PreferenceBatch
from alignment_gap.data.records import Example, collate
from alignment_gap.evaluation.metrics import in_batches
from alignment_gap.sampling import Labeller, Samples
from alignment_gap.sharding import LogicalMesh

# (prompt_ids, prompts, prompt_lengths) -> samples, on the device: `sampling.make_generate` with policy, key and step.
Draw = Callable[..., Samples]


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples reach the devices.

    Attributes:
      mesh: the device mesh, over which a batch is split.
      batch_size: prompts at a time.
      prompt_length: tokens that prompts are padded to.
      response_length: tokens that responses are padded to.
    """

    mesh: LogicalMesh
    batch_size: int
    prompt_length: int
    response_length: int

    def collate(self, examples: Sequence[Example]) -> PreferenceBatch:
        """The examples as numpy arrays; raises UserError where one is over a length."""
        return collate(examples, self.prompt_length, self.response_length)

    def run(self, function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
        """The results, on the host, of a jitted function of the arrays' rows."""
        return in_batches(function, arrays, batch_size=self.batch_size, mesh=self.mesh)


def label(examples: Iterable[Example], labeller: Labeller, batching: Batching) -> Iterator[Example]:
    """The examples with the scores of a labeller, such as `sampling.preference_labeller`; batch by batch."""
    for block in _blocks(examples, batching.batch_size):
        batch = batching.collate(block)
        arrays = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
        scores = batching.run(labeller, arrays)
        for example, row in zip(block, scores, strict=True):
            yield dataclasses.replace(example, scores=np.asarray(row, np.float32))


def draw(prompts: PreferenceBatch, one: Draw, batching: Batching) -> Samples:
    """Samples for every prompt of a batch of any size, on the host."""
    return batching.run(one, (prompts.prompt_ids, prompts.prompts, prompts.prompt_lengths))


def sample_examples(examples: Iterable[Example], draws: Sequence[Draw], batching: Batching) -> Iterator[Example]:
    """Every example's prompt with fresh responses, those of the first of `draws` before those of the second.

    No response is preferred: scores are 0.5 until `label` says more.
    """
    for block in _blocks(examples, batching.batch_size):
        prompts = batching.collate([_without_responses(example) for example in block])
        drawn = [draw(prompts, one, batching) for one in draws]
        for row, example in enumerate(block):
            responses = tuple(
                tokens[:length]
                for samples in drawn
                for tokens, length in zip(samples.responses[row], samples.lengths[row], strict=True)
            )
            scores = np.full(len(responses), 0.5, np.float32)
            yield Example(example.prompt_id, example.prompt, responses, scores)


def _without_responses(example: Example) -> Example:
    """The prompt with a response of one token, for an example must have one: what it had may be over the length."""
    return Example(example.prompt_id, example.prompt, (example.prompt[:1],), np.zeros(1, np.float32))


def _blocks(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    rest = iter(examples)
    while block := list(itertools.islice(rest, size)):
        yield block
