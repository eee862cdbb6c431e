"""What rounding the base of adapters costs: KL in nats a token from a policy to itself with rounded parameters.

    python benchmarks/int8_base.py --run runs/sft --dataset runs/prepared/validation --prompts 256

It rounds all parameters to bfloat16, or the projections to int8 as `AdapterConfig.base_dtype` does. The computation is
in float32 both times, so that the parameters alone differ. Responses are samples of the policy; the KL of each token is
exact over the vocabulary.
"""

from __future__ import annotations

import argparse

import jax
import numpy as np

from alignment_gap.data.records import open_dataset
from alignment_gap.data.records.card import find_vocabulary
from alignment_gap.evaluation.batching import Batching
from alignment_gap.evaluation.intervals import mean_interval
from alignment_gap.evaluation.metrics import make_divergence
from alignment_gap.jobs.compose import distinct_prompts
from alignment_gap.jobs.generate import drawing
from alignment_gap.models import AdapterConfig, Adapters
from alignment_gap.sampling import SamplerConfig
from alignment_gap.sharding import MeshConfig, make_mesh
from alignment_gap.training import load_policy


def main() -> None:
    """Prints one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="folder of a policy's run")
    parser.add_argument("--dataset", required=True, help="whose prompts are answered")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    mesh, dataset = make_mesh(MeshConfig()), open_dataset(arguments.dataset)
    policy, params = load_policy(arguments.run, mesh)
    shape = (dataset.card.max_prompt_length, dataset.card.max_response_length)
    batching = Batching(mesh, arguments.batch, (shape,))
    asked = batching.collate([dataset[int(i)] for i in distinct_prompts(dataset, arguments.prompts)])
    rows = (asked.prompts, asked.prompt_lengths)
    settings = {"samples": 1, "max_length": shape[1], "eos_id": find_vocabulary(dataset).eos_id}
    draw = drawing(policy, params, mesh, jax.random.key(0), config=SamplerConfig(), **settings)
    drawn = batching.run(draw, (asked.prompt_ids, *rows))
    divergence = make_divergence(policy, mesh)
    rounded = {
        "bfloat16": jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), params),
        "int8": Adapters(policy, AdapterConfig(1)).rounded(params),
    }
    print("| rounded to | KL, nats a token | 95 % interval |\n| --- | --- | --- |")
    for name, other in rounded.items():

        def measure(*texts: jax.Array, other: object = other) -> jax.Array:
            return divergence(params, other, *texts)

        found = batching.run(measure, (*rows, drawn.responses, drawn.lengths)) / np.asarray(drawn.lengths)[:, 0]
        mean = mean_interval(found)
        print(f"| {name} | {mean.value:.2e} | {mean.low:.2e} to {mean.high:.2e} |")
    print(f"\n{arguments.prompts} prompts of {dataset.card.count:,}; {arguments.run}")


if __name__ == "__main__":
    main()
