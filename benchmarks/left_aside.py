"""Measures three well-kept libraries in places where this package does not use them.

    python benchmarks/left_aside.py

- grain, to read and batch records: pairs per second of CPU time, in turn with the offline source. Both read the same
  records in a shuffled order, the batch of any step, and make the same arrays. grain has its own file, in the format
  that is fastest for it.
- Orbax, to write a checkpoint that is read from a file: the growth of a process's peak memory while it writes 512 MiB
  of parameters, which can be read one by one. docs/architecture.md explains why this matters.
- The compiler's own cost analysis, instead of the text of the compiled program: the FLOPs and bytes that each finds in
  an update step with 2 and with 8 scanned layers.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from offline_source import (
    BATCH,
    PROMPT,
    RESPONSE,
    examples,
    hh_like_lengths,
    in_a_process,
    peak_memory,
    print_table,
    source_of,
)

from alignment_gap.data.records import Dataset, open_dataset, write_dataset

LAYERS, MIB = 32, 2**20


def reading(dataset: Dataset, steps: int, repeats: int) -> dict[str, float]:
    """Pairs per second of CPU time for each way to read; the median over repeats, in which they take turns."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    from alignment_gap.data.batches.collation import collate_records

    writer = ArrayRecordWriter(str(dataset.folder / "grain.array_record"), "group_size:1")
    for record in dataset.records(range(len(dataset))):
        writer.write(record)
    writer.close()
    batches = (
        grain.MapDataset.source(grain.sources.ArrayRecordDataSource([str(dataset.folder / "grain.array_record")]))
        .seed(0)
        .shuffle()
        .repeat()
        .batch(BATCH, drop_remainder=True, batch_fn=lambda found: collate_records(found, PROMPT, RESPONSE))
    )
    ways: dict[str, Callable[[int], Any]] = {"source": source_of(dataset), "grain": batches.__getitem__}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.process_time()
            for step in range(repeat * steps, (repeat + 1) * steps):
                way(step)
            found[name].append(steps * BATCH / (time.process_time() - start))
    return {name: statistics.median(rates[1:]) for name, rates in found.items()}


def write(library: str) -> None:
    """Prints the growth of this process's peak memory, in MiB, while one of the two writes a checkpoint."""
    import jax

    from alignment_gap.checkpoints import Network
    from alignment_gap.checkpoints.layout import write_checkpoint
    from alignment_gap.checkpoints.tensors import Tensor
    from alignment_gap.sharding import MeshConfig, make_mesh, replicated

    def read(number: int | None) -> np.ndarray:
        return np.random.default_rng(number).random((4 * MIB,), np.float32)

    mesh = make_mesh(MeshConfig())
    jax.block_until_ready(jax.device_put(np.zeros(4), replicated(mesh)))
    with tempfile.TemporaryDirectory() as folder:
        names = [f"layer_{number}" for number in range(LAYERS)]
        before = peak_memory()
        if library == "orbax":
            import orbax.checkpoint as ocp

            # Orbax writes a tree of arrays, so the whole tree is in memory.
            tree = {name: jax.device_put(read(number), replicated(mesh)) for number, name in enumerate(names)}
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(pathlib.Path(folder) / "params", tree)
        else:
            tensors = {
                name: Tensor((4 * MIB,), "float32", lambda _, number=number: read(number))
                for number, name in enumerate(names)
            }
            write_checkpoint(pathlib.Path(folder), 1, Network(), tensors)
        print(json.dumps({"MiB": 1024 * (peak_memory() - before)}))


def counts(layers: int) -> dict[str, float]:
    """FLOPs and bytes of a decoder's update step, by the cost analysis and by the program's text."""
    import jax

    from alignment_gap.checkpoints import Network
    from alignment_gap.jobs.assembly import Assembly, BatchShape, Facts
    from alignment_gap.jobs.config import JobConfig, LossConfig
    from alignment_gap.models import DecoderConfig
    from alignment_gap.plan.hlo import hbm_traffic, parse
    from alignment_gap.sharding import MeshConfig, make_mesh
    from alignment_gap.training.flops import count_flops

    model = DecoderConfig(vocabulary_size=512, width=256, layers=layers, head_size=64, mlp_width=1024)
    facts = Facts(Network(model=model), BatchShape(8, 64, 2, 32))
    assembly = Assembly(JobConfig(loss=LossConfig("simpo")), facts, make_mesh(MeshConfig()))
    abstract = (assembly.abstract, assembly.abstract_batch())
    lowered = assembly.update_step.lower(*abstract)
    compiled = lowered.compile()
    analysis = compiled.cost_analysis()
    return {
        "layers": layers,
        "GFLOP, cost analysis": analysis["flops"] / 1e9,
        "GFLOP, the plan's": count_flops(jax.make_jaxpr(assembly.update_step)(*abstract)) / 1e9,
        "MB, cost analysis": analysis["bytes accessed"] / 1e6,
        "MB, the plan's": hbm_traffic(parse(compiled.as_text())) / 1e6,
    }


def main() -> None:
    """Prints a table for each of the three libraries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20_000, help="pairs in the dataset that is read")
    parser.add_argument("--steps", type=int, default=200, help="batches per repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", choices=("orbax", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(options.write)
        return
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, examples(hh_like_lengths(options.pairs)), vocabulary_digest="", provenance={})
        rates = reading(open_dataset(folder), options.steps, options.repeats)
    print_table([{"reading": name, "pairs per CPU second": rate} for name, rate in rates.items()])
    sizes = {name: in_a_process("--write", name)["MiB"] for name in ("ours", "orbax")}
    print_table([{"writing 512 MiB": name, "peak grows by, MiB": size} for name, size in sizes.items()])
    print_table([counts(layers) for layers in (2, 8)])


if __name__ == "__main__":
    main()
