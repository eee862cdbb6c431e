"""CPU time to compile the update step by the number of layers, as a ratio to one layer.

    python benchmarks/compile_time.py t5_xxl_online_v5e
    python benchmarks/compile_time.py palm_8b --layers 8

The name is one of plan_matrix.py. Compiles the update of that plan for TPUs: with one layer (of encoder and decoder
each), with the given numbers, and with all layers. The layers are one loop, so the time should not grow. CPU time
hardly depends on other work; the start of the compiling process is in it. No TPU is needed. Each compilation takes a
minute or more on two cores.
"""

from __future__ import annotations

import argparse
import os
import resource

os.environ["JAX_PLATFORMS"] = "cpu"

from plan_matrix import commands

from alignment_gap.cli.plan import read_config
from alignment_gap.models import ModelConfig
from alignment_gap.plan.programs import compile_program


def depths(model: ModelConfig) -> dict[str, int]:
    """The fields with a number of layers, and their values."""
    return {
        name: getattr(model, name) for name in ("layers", "encoder_layers", "decoder_layers") if hasattr(model, name)
    }


def cpu_seconds() -> float:
    """CPU time of all processes that this one started and that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Prints a row for each number of layers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*commands()])
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="numbers of layers beside one and all")
    flags = parser.parse_args()
    parsed = read_config(["plan", *commands()[flags.name]])
    assert parsed is not None
    config, update = parsed[0], parsed[0].programs[0]
    all_layers = depths(update.model)
    print(f"{flags.name}\n\n| layers | CPU s | over one layer | peak of the compiling process, GiB |")
    print("| --- | --- | --- | --- |", flush=True)
    first = 0.0
    for layers in sorted({1, *flags.layers, max(all_layers.values())}):
        before = cpu_seconds()
        compiled = compile_program(config, update.with_model(**dict.fromkeys(all_layers, layers)))
        seconds = cpu_seconds() - before
        first = first or seconds
        print(f"| {layers} | {seconds:.0f} | {seconds / first:.2f} | {compiled.host_bytes / 2**30:.1f} |", flush=True)


if __name__ == "__main__":
    main()
