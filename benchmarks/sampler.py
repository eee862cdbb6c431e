"""Tokens per second of the sampler, for both policies at three sizes, on all devices.

    python benchmarks/sampler.py --sizes tiny --repeats 5

The end id is never drawn, so every response has its full length, and every call does the same work. One untimed repeat
warms up and compiles. A row has the median over the repeats, the slowest and the fastest. After the table comes a line
of JSON for each row.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
from update_step import SAMPLES, arguments, assembly_of, configs, peer, print_rows, random_batch, rates, summary

from alignment_gap.jobs.config import OnlineConfig
from alignment_gap.models import ModelConfig, count_parameters, make_policy
from alignment_gap.sharding import batch_sharding
from alignment_gap.training import create_state


def measure(config: ModelConfig, options: argparse.Namespace) -> list[float]:
    """Tokens per second, with two samples per prompt."""
    online = OnlineConfig(samples=SAMPLES)
    assembly = assembly_of(config, options, online)
    state = create_state(assembly.policy.init, assembly.abstract, assembly.optimizer, jax.random.key(0))
    generate = assembly.generate(online, options.response_length)
    batch = jax.device_put(random_batch(options), batch_sharding(assembly.mesh))
    texts, key, step = (batch.prompt_ids, batch.prompts, batch.prompt_lengths), jax.random.key(1), jnp.int32(0)
    tokens = options.batch * SAMPLES * options.response_length
    return rates(lambda: generate(state.params, key, step, *texts), tokens, options)


def main() -> None:
    """Prints a row for each size and policy."""
    options = arguments(__doc__, "two samples")
    rows = []
    for size, name, config in configs(options):
        row = {"size": size, "policy": name, "parameters": count_parameters(make_policy(config))}
        rows.append(summary(row, "tokens/s", measure(config, options)))
    if options.peer:
        found = peer("transformers_generate.py", options=options)
        row = {"size": "compared", "policy": "transformers", "parameters": found["parameters"]}
        rows.append(summary(row, "tokens/s", found["rates"]))
    print_rows(rows)


if __name__ == "__main__":
    main()
