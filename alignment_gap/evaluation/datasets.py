"""Datasets that networks make: labels of a preference model, samples of one policy or of two against each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.data.batches.buckets import Bucket, bucket_of, cut_within_buckets
from alignment_gap.data.batches.collation import collate
from alignment_gap.data.records.dataset import Example
from alignment_gap.data.records.lengths import lengths_of
from alignment_gap.evaluation.metrics import in_batches
from alignment_gap.sampling import Labeller, Samples
from alignment_gap.sharding import LogicalMesh

Result = TypeVar("Result")

# Batches of examples that are brought into buckets together.
_WINDOW = 128
# (prompt_ids, prompts, prompt_lengths) -> samples, on the device: `sampling.make_generate` with policy, key and step.
Draw = Callable[..., Samples]


@dataclasses.dataclass(frozen=True)
class Batching:
    """How examples reach the devices.

    Attributes:
      mesh: the device mesh, over which a batch is split.
      batch_size: prompts at a time.
      shapes: (P, R) that batches are padded to, each holding the one before it, as from `choose_buckets`.
    """

    mesh: LogicalMesh
    batch_size: int
    shapes: tuple[Bucket, ...]

    def collate(self, examples: Sequence[Example]) -> PreferenceBatch:
        """The examples as numpy arrays of the largest shape; raises UserError where one is over a length."""
        return collate(examples, *self.shapes[-1])

    def run(self, function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
        """The results, on the host, of a jitted function of the arrays' rows."""
        return in_batches(function, arrays, batch_size=self.batch_size, mesh=self.mesh)

    def each(
        self, examples: Iterable[Example], function: Callable[[PreferenceBatch], Sequence[Result]]
    ) -> Iterator[tuple[Example, Result]]:
        """Every example with its row of what the function gives for a batch, in the examples' order.

        Batches are of one bucket where it fills them; for that a window of examples is held at a time.
        """
        rest = iter(examples)
        while window := list(itertools.islice(rest, _WINDOW * self.batch_size)):
            found: dict[int, Result] = {}
            fitting = bucket_of(lengths_of(window), self.shapes)
            groups, left = cut_within_buckets(np.arange(len(window)), fitting, self.batch_size)
            for numbers in itertools.chain(*groups, [left] if len(left) else []):
                batch = collate([window[number] for number in numbers], *self.shapes[fitting[numbers].max()])
                found.update(zip(numbers.tolist(), function(batch), strict=True))
            yield from ((example, found[number]) for number, example in enumerate(window))


def label(examples: Iterable[Example], labeller: Labeller, batching: Batching) -> Iterator[Example]:
    """The examples with the scores of a labeller, such as `sampling.preference_labeller`."""

    def scores(batch: PreferenceBatch) -> list[np.ndarray]:
        arrays = (batch.prompts, batch.prompt_lengths, batch.responses, batch.response_lengths)
        return list(np.asarray(batching.run(labeller, arrays), np.float32))

    for example, row in batching.each(examples, scores):
        yield dataclasses.replace(example, scores=row)


def draw(prompts: PreferenceBatch, one: Draw, batching: Batching) -> Samples:
    """Samples for every prompt of a batch of any size, on the host."""
    return batching.run(one, (prompts.prompt_ids, prompts.prompts, prompts.prompt_lengths))


def sample_examples(examples: Iterable[Example], draws: Sequence[Draw], batching: Batching) -> Iterator[Example]:
    """Every example's prompt with fresh responses, those of the first of `draws` before those of the second.

    No response is preferred: scores are 0.5 until `label` says more.
    """

    def responses(batch: PreferenceBatch) -> list[tuple[np.ndarray, ...]]:
        drawn = [draw(batch, one, batching) for one in draws]
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
