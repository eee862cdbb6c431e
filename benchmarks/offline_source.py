"""Speed and memory of the offline source: compared with raw records and the update step, and for 10 million pairs.

    python benchmarks/offline_source.py                      # speed
    python benchmarks/offline_source.py --indexed 10000000   # memory, too
    python benchmarks/offline_source.py --indexed 10000000 --on-disk /big/disk

Speed: shuffled pairs with lengths like HH's (prompts up to 128 tokens, responses up to 64) in batches of 32. "raw"
reads the same records in the same order, one batch at a time, without decoding. "raw, 512" reads 512 records together,
as the source does. "source" makes the arrays of the batch. "prefetched" makes them in a thread. "buckets" has four
buckets, prefetched. "packed" has several prompts per row, prefetched. All take turns, so that other work on the machine
disturbs them equally. Each row has the median over the repeats.

The update step is that of T5 small with SimPO, which needs no reference, on all devices, in the same run. It runs on
batches of one shape, of four shapes, and with packed rows; these take turns step by step. The first and the last have
the same prompts. Each takes its steps twice, and only the second time counts, when all shapes are compiled.

Memory: a separate process puts synthetic lengths into buckets, and shuffles two epochs and cuts them into batches. With
--on-disk, it first writes a dataset with this many records, then reads the lengths from the records and some batches.
The peak is that of this process, from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from alignment_gap.data.batches import Examples, OfflineSource, Prefetched, choose_buckets, offline_source
from alignment_gap.data.records import (
    Dataset,
    Example,
    close_dataset,
    lengths_of,
    open_dataset,
    write_chunk,
    write_dataset,
)

PROMPT, RESPONSE, BATCH = 128, 64, 32
WAYS = ("raw", "raw, 512", "source", "prefetched", "buckets", "packed")
VOCABULARY = 32128


def hh_like_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Lengths of prompt and responses in tokens, int32[count, 3]: lognormal, medians 60 and 30, cut at the limits."""
    rng = np.random.default_rng(seed)
    drawn = rng.lognormal(np.log([60.0, 30.0, 30.0]), [0.7, 0.8, 0.8], (count, 3))
    return np.clip(drawn, [8, 2, 2], [PROMPT, RESPONSE, RESPONSE]).astype(np.int32)


def examples(lengths: np.ndarray, first: int = 0) -> Iterator[Example]:
    """Examples with these lengths and random tokens."""
    tokens = np.random.default_rng(first).integers(0, VOCABULARY, PROMPT + RESPONSE).astype(np.int32)
    scores = np.array([1, 0], np.float32)
    for number, (prompt, chosen, rejected) in enumerate(lengths.tolist(), start=first):
        yield Example(number, tokens[:prompt], (tokens[:chosen], tokens[-rejected:]), scores)


def source_of(dataset: Dataset, buckets: int = 1, packing: int | None = None, row_multiple: int = 1) -> OfflineSource:
    """The source that is measured."""
    return offline_source(
        dataset,
        batch_size=BATCH,
        seed=0,
        prompt_length=PROMPT,
        response_length=RESPONSE,
        buckets=choose_buckets(lengths_of(dataset), buckets, (PROMPT, RESPONSE))[:-1],
        packing=packing,
        row_multiple=row_multiple,
    )


def speed(dataset: Dataset, steps: int, repeats: int) -> dict[str, float]:
    """Pairs per second for each way to read; the median over repeats, in which they take turns."""
    source, bucketed, packed = source_of(dataset), source_of(dataset, buckets=4), source_of(dataset, packing=2)

    def together(step: int) -> np.ndarray:
        return np.concatenate([source.numbers(step + i) for i in range(16)])

    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for repeat in range(repeats + 1):
        at = range(repeat * steps, (repeat + 1) * steps)
        with (
            Prefetched(source, 4) as ahead,
            Prefetched(bucketed, 4) as bucketed_ahead,
            Prefetched(packed, 4) as packed_ahead,
        ):
            ways: dict[str, Callable[[int], Any]] = {
                "raw": lambda step: dataset.records(source.numbers(step).tolist()),
                "raw, 512": lambda step: None if step % 16 else dataset.records(together(step).tolist()),
                "source": source,
                "prefetched": ahead,
                "buckets": bucketed_ahead,
                "packed": packed_ahead,
            }
            for name, way in ways.items():
                start = time.perf_counter()
                for step in at:
                    way(step)
                found[name].append(steps * BATCH / (time.perf_counter() - start))
    return {name: statistics.median(rates[1:]) for name, rates in found.items()}


def update_step_rates(dataset: Dataset, steps: int) -> dict[str, tuple[float, float]]:
    """Padding fraction, and pairs per second of T5 small's update step, for each form of the source's batches."""
    import jax

    from alignment_gap.checkpoints import Network
    from alignment_gap.jobs.assembly import Assembly, BatchShape, Facts
    from alignment_gap.jobs.config import JobConfig, LossConfig
    from alignment_gap.models import sizes
    from alignment_gap.sharding import MeshConfig, batch_sharding, make_mesh
    from alignment_gap.training import create_state

    facts = Facts(Network(model=sizes.get("t5_small")), BatchShape(BATCH, PROMPT, 2, RESPONSE))
    mesh = make_mesh(MeshConfig())
    assembly = Assembly(JobConfig(loss=LossConfig("simpo")), facts, mesh)
    state = create_state(assembly.policy.init, assembly.abstract, assembly.optimizer, jax.random.key(0))
    forms = {
        "one shape": source_of(dataset),
        "4 buckets": source_of(dataset, buckets=4),
        **{f"packed, {n}": source_of(dataset, packing=n, row_multiple=mesh.batch_parts) for n in (2, 4)},
    }
    seconds = dict.fromkeys(forms, 0.0)
    for timed in (False, True):
        for step in range(steps):
            for name, source in forms.items():
                batch = jax.block_until_ready(jax.device_put(source(step), batch_sharding(mesh)))
                start = time.perf_counter()
                state, metrics = assembly.update_step(state, batch)
                jax.block_until_ready(metrics)
                seconds[name] += timed * (time.perf_counter() - start)
    return {name: (source.padding().share, steps * BATCH / seconds[name]) for name, source in forms.items()}


def peak_memory() -> float:
    """This process's peak memory in GiB. getrusage would include the memory of its parent."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


class Lengths(Examples):
    """Examples that have only lengths."""

    def __init__(self, lengths: np.ndarray):
        self._lengths, self.sizes = lengths, (len(lengths),)

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self) -> np.ndarray:
        """Lengths in tokens, int32[N, 3]."""
        return self._lengths


def index(count: int, on_disk: str) -> None:
    """Prints the time and memory to index, shuffle and bucket `count` pairs; runs in a separate process."""
    start = time.perf_counter()
    pairs = Examples([open_dataset(on_disk)]) if on_disk else Lengths(hh_like_lengths(count))
    shapes = choose_buckets(pairs.lengths(), 4, (PROMPT, RESPONSE))[:-1]
    indexed = time.perf_counter()
    source = offline_source(
        pairs, batch_size=BATCH, seed=0, prompt_length=PROMPT, response_length=RESPONSE, buckets=shapes
    )
    source.numbers(0)
    first = time.perf_counter()
    source.numbers(len(pairs) // BATCH + 1)
    second = time.perf_counter()
    if on_disk:
        for step in range(100):
            source(step)
    row = {
        "pairs": len(pairs),
        "from": "records" if on_disk else "lengths",
        "index, s": indexed - start,
        "first epoch, s": first - indexed,
        "next epoch, s": second - first,
        "padding without buckets": 1 - pairs.lengths().sum() / len(pairs) / (PROMPT + 2 * RESPONSE),
        "padding with 4": source.padding().share,
        "peak, GiB": peak_memory(),
    }
    print(json.dumps(row))


def write_many(folder: pathlib.Path, count: int, chunk: int = 500_000) -> None:
    """Writes a dataset of `count` short pairs, one file after another; existing files are kept."""
    for first in range(0, count, chunk):
        if not list(folder.glob(f"pairs-{first:012}.array_record")):
            lengths = np.maximum(hh_like_lengths(min(chunk, count - first), first) // 8, 1)
            write_chunk(folder, f"pairs-{first:012}", examples(lengths, first))
    if not (folder / "card.json").exists():
        close_dataset(folder, vocabulary_digest="", provenance={"made": "for a benchmark"})


def in_a_process(*flags: str) -> dict[str, Any]:
    """The output of this script, run in a separate process."""
    done = subprocess.run([sys.executable, sys.argv[0], *flags], check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a markdown table."""
    print("| " + " | ".join(rows[0]) + " |\n| " + " | ".join("---" for _ in rows[0]) + " |")
    for row in rows:
        print(
            "| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()), "|"
        )
    print()


def main() -> None:
    """Prints a table of speeds and, with --indexed, a table of memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs in the dataset that is read")
    parser.add_argument("--steps", type=int, default=200, help="batches per repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--update-steps", type=int, default=4, help="timed update steps of each form")
    parser.add_argument("--indexed", type=int, default=0, help="pairs that are indexed and shuffled; 0 for none")
    parser.add_argument("--on-disk", default="", help="folder in which this many records are written and indexed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        index(options.indexed, options.on_disk)
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, examples(hh_like_lengths(options.pairs)), vocabulary_digest="", provenance={})
        dataset = open_dataset(folder)
        rates = speed(dataset, options.steps, options.repeats)
        trained = update_step_rates(dataset, options.update_steps)
        consumed = trained["one shape"][1]
        rows = [
            {
                "reading": name,
                "pairs/s": rate,
                "over raw": rate / rates["raw"],
                "over raw, 512": rate / rates["raw, 512"],
                "over the update step": rate / consumed,
            }
            for name, rate in rates.items()
        ]
        print_table(rows)
        rows = [
            {
                "batches": name,
                "share of padding": share,
                "update step, pairs/s": rate,
                "over one shape": rate / consumed,
            }
            for name, (share, rate) in trained.items()
        ]
        print_table(rows)
    if options.indexed:
        rows = [in_a_process("--child", "--indexed", str(options.indexed))]
        if options.on_disk:
            folder = pathlib.Path(options.on_disk) / f"pairs-{options.indexed}"
            write_many(folder, options.indexed)
            rows.append(in_a_process("--child", "--on-disk", str(folder)))
        print_table(rows)


if __name__ == "__main__":
    main()
