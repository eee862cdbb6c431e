"""The policy of a run and the prompts of a dataset, for benchmarks that compare a policy with a form of itself."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.evaluation.batching import Batching
from alignment_gap.jobs.compose import distinct_prompts
from alignment_gap.jobs.generate import drawing
from alignment_gap.models import Policy
from alignment_gap.sampling import SamplerConfig, Samples
from alignment_gap.sharding import LogicalMesh, MeshConfig, make_mesh
from alignment_gap.training import load_policy


class Answering(NamedTuple):
    """A policy and the prompts that it answers.

    Attributes:
      policy: the policy of the run.
      params: its parameters.
      mesh: all devices.
      batching: splits the prompts into batches.
      asked: the prompts.
      settings: of a draw: one sample of the dataset's longest response.
      about: a line about prompts and run.
    """

    policy: Policy
    params: Any
    mesh: LogicalMesh
    batching: Batching
    asked: PreferenceBatch
    settings: dict[str, Any]
    about: str

    @property
    def prompts(self) -> tuple[jax.Array, jax.Array]:
        """The prompts' tokens and lengths."""
        return self.asked.prompts, self.asked.prompt_lengths

    def samples(self, policy: Policy, config: SamplerConfig) -> Samples:
        """A sample for each prompt, by the policy in this form and with the run's parameters."""
        draw = drawing(policy, self.params, self.mesh, jax.random.key(0), config=config, **self.settings)
        return draw(self.batching, (self.asked.prompt_ids, *self.prompts))


def answering(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> Answering:
    """Reads the flags --run, --dataset, --prompts and --batch, and what they name."""
    parser.add_argument("--run", required=True, help="folder of a policy's run")
    parser.add_argument("--dataset", required=True, help="whose prompts are answered")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    flags = parser.parse_args(words)
    mesh, dataset = make_mesh(MeshConfig()), open_dataset(flags.dataset)
    policy, params = load_policy(flags.run, mesh)
    shape = (dataset.card.max_prompt_length, dataset.card.max_response_length)
    batching = Batching(mesh, flags.batch, (shape,))
    asked = batching.collate([dataset[int(i)] for i in distinct_prompts(dataset, flags.prompts)])
    settings = {"samples": 1, "max_length": shape[1], "eos_id": find_vocabulary(dataset).eos_id}
    about = f"{flags.prompts} prompts of {dataset.card.count:,}; {flags.run}"
    return Answering(policy, params, mesh, batching, asked, settings, about)
