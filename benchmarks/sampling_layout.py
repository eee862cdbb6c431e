"""Time of a sampled token by how many chips share a copy of the weights: what the plan chooses, and every other choice.

    python benchmarks/sampling_layout.py t5_large_online_v5e
    python benchmarks/sampling_layout.py t5_large_online_v5e --copies 1 64

The name is one of plan_matrix.py. Compiles the sampler of that plan for TPUs, once for each number of copies. Prints a
row for each: the times that arithmetic, HBM and interconnect take alone, at best, per token; the collectives per token;
and the peak of a chip's memory. The first row is the sampler's own choice. No TPU is needed. Each compilation takes
minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

from plan_matrix import commands

from alignment_gap.cli.plan import read_config
from alignment_gap.plan.programs import Compiled, compile_here, environment
from alignment_gap.plan.roofline import times
from alignment_gap.plan.steps import PlanConfig, Program
from alignment_gap.sharding import layout
from alignment_gap.sharding.chips import GIB


def compiled_with(config: PlanConfig, program: Program, copies: int | None) -> tuple[Compiled, int]:
    """The compiled sampler and its number of copies along fsdp; None for the sampler's own choice."""
    chosen: list[int] = []
    own = layout.weight_copies

    def choose(sizes: Mapping[str, int], *arguments: Any) -> int:
        if copies is not None and sizes["fsdp"] % copies:
            raise SystemExit(f"copies is {copies}: it must divide fsdp={sizes['fsdp']}")
        chosen.append(own(sizes, *arguments) if copies is None else copies)
        return chosen[-1]

    with mock.patch.object(layout, "weight_copies", choose):
        return compile_here(config, program), chosen[-1]


def per_token(config: PlanConfig, program: Program, compiled: Compiled) -> list[str]:
    """Milliseconds a token that arithmetic, HBM and interconnect take alone, and the longest of them, at best."""
    share, tokens = compiled.flops / config.topology.devices, program.batch.response
    time = times(config.topology.chip, share, compiled.traffic, compiled.collectives)
    return [f"{1e3 * each / tokens:.2f}" for each in (time.compute, time.hbm, time.interconnect, time.seconds)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[name for name in commands() if "online" in name])
    parser.add_argument("--copies", type=int, nargs="*", default=[1], help="numbers of copies beside the own choice")
    flags = parser.parse_args()
    config, _ = read_config(["plan", *commands()[flags.name]])
    (program,) = (each for each in config.programs if each.name == "sampling")
    os.environ.update(environment(config.topology))
    tokens = program.batch.response
    print("| copies | arithmetic, ms a token | HBM | interconnect | at best | collectives a token | peak, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for copies in (None, *flags.copies):
        compiled, found = compiled_with(config, program, copies)
        cells = per_token(config, program, compiled)
        count = sum(moved.count for moved in compiled.collectives if moved.count >= tokens) / tokens
        print(f"| {found} | {' | '.join(cells)} | {count:.0f} | {compiled.peak / GIB:.2f} |", flush=True)
        for moved in compiled.collectives[:6]:
            print(f"<!-- {moved} -->", flush=True)


if __name__ == "__main__":
    main()
