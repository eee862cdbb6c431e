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
from answering import answering

from alignment_gap.evaluation.intervals import mean_interval
from alignment_gap.evaluation.metrics import make_divergence
from alignment_gap.models import AdapterConfig, Adapters
from alignment_gap.sampling import SamplerConfig


def main() -> None:
    """Prints one markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = answering(parser)
    policy, params = given.policy, given.params
    drawn = given.samples(policy, SamplerConfig())
    divergence = make_divergence(policy, given.mesh)
    rounded = {
        "bfloat16": jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), params),
        "int8": Adapters(policy, AdapterConfig(1)).rounded(params),
    }
    print("| rounded to | KL, nats a token | 95 % interval |\n| --- | --- | --- |")
    for name, other in rounded.items():

        def measure(*texts: jax.Array, other: object = other) -> jax.Array:
            return divergence(params, other, *texts)

        texts = (*given.prompts, drawn.responses, drawn.lengths)
        found = given.batching.run(measure, texts) / np.asarray(drawn.lengths)[:, 0]
        mean = mean_interval(found)
        print(f"| {name} | {mean.value:.2e} | {mean.low:.2e} to {mean.high:.2e} |")
    print(f"\n{given.about}")


if __name__ == "__main__":
    main()
