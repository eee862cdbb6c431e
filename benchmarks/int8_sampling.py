"""What prompts and weights in int8 save in a TPU slice's sampler, and what they change in the samples.

    python benchmarks/int8_sampling.py plan --model=t5_xxl --topology=v5e:16x16 --judge=t5_large
    python benchmarks/int8_sampling.py run --run=runs/sft --dataset=runs/prepared/validation --prompts=256

"plan" compiles the sampler of an online step for TPUs, with the prompts' keys and values, the weights, both or neither
in int8; its flags are those of `alignment-gap plan`. It prints the times that arithmetic, HBM and interconnect take
alone, at best, for each token, and the peak of a chip's memory. No TPU is needed.

"run" samples from a policy with each of these, computed in float32 and in bfloat16. For each sample it compares the
log-prob under the distribution that it was drawn from with the policy's own, as the update step computes it. The mean
of their difference is the KL from one to the other in nats. The weights p / q would correct a gradient for it: the more
they spread, the further off is a gradient that nothing corrects.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from answering import answering

from alignment_gap.evaluation.intervals import mean_interval
from alignment_gap.models import make_policy
from alignment_gap.sampling import SamplerConfig
from alignment_gap.training import make_score

# What is in int8.
SAMPLERS = {
    "nothing": SamplerConfig(),
    "prompts": SamplerConfig(prompt_cache_dtype="int8"),
    "weights": SamplerConfig(weights_dtype="int8"),
    "both": SamplerConfig(prompt_cache_dtype="int8", weights_dtype="int8"),
}


def plan(words: Sequence[str]) -> None:
    """Prints a row for each sampler."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from sampling_layout import per_token

    from alignment_gap.cli.plan import read_config
    from alignment_gap.plan.programs import compile_here, environment
    from alignment_gap.sharding.chips import GIB

    config, _ = read_config(["plan", *words, "--online", "--nosearch"])
    (program,) = (each for each in config.programs if each.name == "sampling")
    os.environ.update(environment(config.topology))
    print("| in int8 | arithmetic, ms a token | HBM | interconnect | at best | peak, GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, sampler in SAMPLERS.items():
        source = dataclasses.replace(config.job.source, sampler=sampler)  # type: ignore[type-var]
        job = dataclasses.replace(config.job, source=source)
        compiled = compile_here(dataclasses.replace(config, job=job), program)
        cells = " | ".join(per_token(config, program, compiled))
        print(f"| {name} | {cells} | {compiled.peak / GIB:.2f} |", flush=True)


def run(words: Sequence[str]) -> None:
    """Prints a row for each dtype of the computation, and each sampler."""
    given = answering(argparse.ArgumentParser(prog="int8_sampling.py run"), words)
    print("| computed in | in int8 | KL, nats a response | 95 % interval | spread of p / q | largest p / q |")
    print("| --- | --- | --- | --- | --- | --- |")
    for computed in ("float32", "bfloat16"):
        policy = make_policy(dataclasses.replace(given.policy.config, dtype=computed))
        score = make_score(policy, given.mesh)
        for name, sampler in SAMPLERS.items():
            drawn = given.samples(policy, sampler)
            texts = (*given.prompts, drawn.responses, drawn.lengths)
            own = given.batching.run(lambda *texts: score(given.params, *texts), texts)  # noqa: B023
            difference = np.asarray(jnp.sum(drawn.sampler_log_probs - own, axis=(1, 2)))
            mean, weights = mean_interval(difference), np.exp(-difference)
            cells = [f"{mean.value:.2e}", f"{mean.low:.2e} to {mean.high:.2e}", f"{weights.std():.2e}"]
            print(f"| {computed} | {name} | {' | '.join(cells)} | {weights.max():.4f} |", flush=True)
    print(f"\n{given.about}")


if __name__ == "__main__":
    modes = {"plan": plan, "run": run}
    if len(sys.argv) < 2 or sys.argv[1] not in modes:
        sys.exit(__doc__)
    modes[sys.argv[1]](sys.argv[2:])
