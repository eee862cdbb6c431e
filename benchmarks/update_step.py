"""Pairs per second of the update step, for both policies at three sizes, on all devices.

    python benchmarks/update_step.py --sizes tiny --repeats 5

"precomputed" is the update step alone, on a batch with reference log-probs. "every step" first scores the batch under
the reference policy, as a run without stored log-probs does. One untimed repeat warms up and compiles. A row has the
median over the repeats, the slowest and the fastest. After the table comes a line of JSON for each row.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alignment_gap.checkpoints import Network
from alignment_gap.data.batches import PreferenceBatch
from alignment_gap.jobs.assembly import Assembly, BatchShape, Facts
from alignment_gap.jobs.config import DatasetConfig, JobConfig, LossConfig, OnlineConfig
from alignment_gap.models import DecoderConfig, ModelConfig, T5Config, count_parameters, make_policy, sizes
from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh
from alignment_gap.training import TrainState, create_state, with_reference

VOCABULARY, SAMPLES = 136, 2
RECORDED = DatasetConfig()
# "tiny" and "mini" are the models of gin/models/*_tiny.gin and *_mini.gin with few ids; "compared" has the size of the
# models in peers/, and T5 v1.1 small.
SIZES: dict[str, dict[str, ModelConfig]] = {
    "tiny": {
        "t5": T5Config(vocabulary_size=VOCABULARY, heads=2, head_size=32, scan_unroll=2),
        "decoder": DecoderConfig(vocabulary_size=VOCABULARY, scan_unroll=2),
    },
    "mini": {
        "t5": T5Config(
            vocabulary_size=VOCABULARY,
            width=256,
            encoder_layers=4,
            decoder_layers=4,
            heads=4,
            head_size=64,
            mlp_width=512,
        ),
        "decoder": DecoderConfig(vocabulary_size=VOCABULARY, width=256, layers=4, heads=4, head_size=64, mlp_width=512),
    },
    "compared": {
        "t5": sizes.get("t5_small"),
        "decoder": DecoderConfig(width=512, layers=8, heads=8, kv_heads=8, head_size=64, mlp_width=1408),
    },
}
PEERS = pathlib.Path(__file__).parent / "peers"


def arguments(description: str, samples: str) -> argparse.Namespace:
    """The flags of both benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--policies", nargs="+", choices=("t5", "decoder"), default=["t5", "decoder"])
    parser.add_argument("--batch", type=int, default=32, help=f"prompts, each with {samples}")
    parser.add_argument("--prompt-length", type=int, default=48, help="tokens")
    parser.add_argument("--response-length", type=int, default=12, help="tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10, help="calls in a repeat")
    parser.add_argument("--peer", help="a Python with torch and TRL (`make parity`): one more row, of the peer")
    return parser.parse_args()


def configs(options: argparse.Namespace) -> Iterator[tuple[str, str, ModelConfig]]:
    """Size, policy and config of every requested model."""
    for size in options.sizes:
        for name in options.policies:
            values = {**vars(SIZES[size][name]), "dtype": options.dtype}
            yield size, name, type(SIZES[size][name])(**values)


def rates(call: Callable[[], Any], work: float, options: argparse.Namespace) -> list[float]:
    """Work per second of each repeat, after one to warm up; every repeat waits for the device at its end."""
    found = []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        for _ in range(options.calls):
            result = call()
        jax.block_until_ready(result)
        found.append(options.calls * work / (time.perf_counter() - start))
    return found[1:]


def peer(script: str, *flags: str, options: argparse.Namespace) -> dict[str, Any]:
    """The output of a script in peers/: the rates of another library with the same batch and lengths."""
    sizes = [
        f"--{name}={getattr(options, name.replace('-', '_'))}" for name in ("batch", "prompt-length", "response-length")
    ]
    run = subprocess.run([options.peer, PEERS / script, *sizes, *flags], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def product_rate() -> float:
    """GFLOP/s of a large float32 product, which shows how fast the machine is now."""
    x = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.matmul)
    found = []
    for _ in range(10):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        found.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return max(found)


def summary(row: dict[str, Any], unit: str, found: Sequence[float]) -> dict[str, Any]:
    """The row with the median rate and its spread."""
    return row | {f"{unit}": statistics.median(found), "slowest": min(found), "fastest": max(found)}


def print_rows(rows: Sequence[dict[str, Any]]) -> None:
    """The device, a markdown table, then JSON lines."""
    load = os.getloadavg()[0]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    where = {"device": device, "jax": jax.__version__, "product GFLOP/s": round(product_rate())}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{device}, jax {where['jax']}, {os.cpu_count()} cores, load at the end {load:.1f}")
    print(f"a large float32 product: {where['product GFLOP/s']} GFLOP/s; peak memory of this process {peak:.2f} GiB\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        cells = (
            value if isinstance(value, str) else f"{value:,.{0 if value >= 100 else 2}f}" for value in row.values()
        )
        print("| " + " | ".join(cells) + " |")
    print()
    for row in rows:
        print(json.dumps(where | {"load": load} | row))


def random_batch(options: argparse.Namespace) -> PreferenceBatch:
    """Pairs of full length with random tokens."""
    rng, pair = np.random.default_rng(0), (options.batch, SAMPLES)
    return PreferenceBatch(
        prompt_ids=np.arange(options.batch, dtype=np.int32),
        prompts=rng.integers(2, VOCABULARY, (options.batch, options.prompt_length), dtype=np.int32),
        prompt_lengths=np.full(options.batch, options.prompt_length, np.int32),
        responses=rng.integers(2, VOCABULARY, (*pair, options.response_length), dtype=np.int32),
        response_lengths=np.full(pair, options.response_length, np.int32),
        scores=np.tile(np.array([1, 0], np.float32), (options.batch, 1)),
    )


def assembly_of(
    config: ModelConfig, options: argparse.Namespace, source: DatasetConfig | OnlineConfig = RECORDED
) -> Assembly:
    """A job of IPO with the batch and the lengths of the flags; its samples never end early."""
    shape = BatchShape(options.batch, options.prompt_length, SAMPLES, options.response_length)
    job = JobConfig(config, loss=LossConfig("ipo", {"beta": 0.1}), source=source, start="start")
    facts = Facts(Network(model=config), shape, end_ids=(config.vocabulary_size,))
    return Assembly(job, facts, make_mesh(MeshConfig()))


def measure(config: ModelConfig, options: argparse.Namespace) -> Iterator[tuple[str, list[float]]]:
    """Pairs per second with the reference precomputed, and with it computed in every step."""
    assembly = assembly_of(config, options)
    batch = jax.device_put(random_batch(options), batch_sharding(assembly.mesh))

    def fresh(seed: int) -> TrainState:
        return create_state(assembly.policy.init, assembly.abstract, assembly.optimizer, jax.random.key(seed))

    reference = fresh(0).params
    score = with_reference(lambda step, state: batch, assembly.score, lambda state: reference)
    scored = score(0, fresh(1))
    for name, source in (("precomputed", lambda step, state: scored), ("every step", score)):
        state = fresh(1)

        def call(source: Any = source) -> Any:
            nonlocal state
            state, metrics = assembly.update_step(state, source(0, state))
            return metrics

        yield name, rates(call, options.batch, options)


def main() -> None:
    """Prints a row for each size and policy, with and without a precomputed reference."""
    options = arguments(__doc__, "two responses")
    rows = []
    for size, name, config in configs(options):
        row = {"size": size, "policy": name, "parameters": count_parameters(make_policy(config))}
        for reference, found in measure(config, options):
            rows.append(summary(row | {"reference": reference}, "pairs/s", found))
    for flags in ([], ["--precompute"]) if options.peer else ():
        found = peer("trl_update_step.py", *flags, options=options)
        row = {"size": "compared", "policy": "TRL", "parameters": found["parameters"], "reference": found["reference"]}
        rows.append(summary(row, "pairs/s", found["rates"]))
    print_rows(rows)


if __name__ == "__main__":
    main()
