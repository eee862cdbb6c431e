"""Pairs per second of the whole online step, for both policies at three sizes, on all devices.

    python benchmarks/online_step.py --sizes tiny --repeats 5

A step draws two samples for each prompt, scores them, takes the reference's log-probs, and updates. The judge counts
tokens, so that it costs nothing. The end id is never drawn, so that every response has its full length. One untimed
repeat warms up and compiles. A row has the median over the repeats, the slowest and the fastest. After the table comes
a line of JSON for each row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from update_step import arguments, assembly_of, configs, peer, print_rows, random_batch, rates, summary

from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.jobs.config import OnlineConfig
from alignment_gap.models import ModelConfig, count_parameters, make_policy
from alignment_gap.sampling import against_each_other, online_source
from alignment_gap.sharding import batch_sharding
from alignment_gap.training import TrainState, create_state, with_reference


def measure(config: ModelConfig, options: Any) -> list[float]:
    """Pairs per second."""
    online = OnlineConfig(samples=2)
    assembly = assembly_of(config, options, online)
    generate, key = assembly.generate(online, options.response_length), jax.random.key(1)
    prompts = jax.device_put(random_batch(options), batch_sharding(assembly.mesh))

    def fresh(seed: int) -> TrainState:
        return create_state(assembly.policy.init, assembly.abstract, assembly.optimizer, jax.random.key(seed))

    def draw(state: TrainState, batch: PreferenceBatch) -> Any:
        return generate(state.params, key, state.step, batch.prompt_ids, batch.prompts, batch.prompt_lengths)

    @jax.jit
    def even_tokens(prompts: Any, prompt_lengths: Any, responses: Any, lengths: Any) -> Any:
        return jnp.mean(responses % 2 == 0, axis=-1, dtype=jnp.float32)

    source = online_source(lambda step: prompts, draw, against_each_other(even_tokens), "all", assembly.mesh)
    reference, state = fresh(0).params, fresh(1)
    source = with_reference(source, assembly.score, lambda state: reference)

    def call() -> Any:
        nonlocal state
        state, metrics = assembly.update_step(state, source(0, state))
        return metrics

    return rates(call, options.batch, options)


def main() -> None:
    """Prints a row for each size and policy."""
    options = arguments(__doc__, "two samples")
    rows = []
    for size, name, config in configs(options):
        row = {"size": size, "policy": name, "parameters": count_parameters(make_policy(config))}
        rows.append(summary(row, "pairs/s", measure(config, options)))
    if options.peer:
        found = peer("trl_online_step.py", options=options)
        row = {"size": "compared", "policy": "TRL", "parameters": found["parameters"]}
        rows.append(summary(row, "pairs/s", found["rates"]))
    print_rows(rows)


if __name__ == "__main__":
    main()
