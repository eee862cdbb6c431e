"""Time of a sampled token on a TPU slice by the number of loops that draw a response: fewer empty places are read.

    python benchmarks/long_responses.py --loops 1 4 8 --model=llama3_8b --topology=v5e:4x4 --batch=32 \\
        --prompt_length=256 --response_length=1024

After --loops come the flags of `alignment-gap plan`. Compiles the sampler of an online step ahead of time, once for
each number of loops. Prints a row for each: the times that arithmetic, HBM and interconnect take alone, at best, per
token; the peak of a chip's memory; and the time to trace and compile on this machine. No TPU is needed.
"""

from __future__ import annotations

import argparse
import os
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"

from sampling_layout import per_token

from alignment_gap.cli.plan import read_config
from alignment_gap.plan.programs import compile_here, environment
from alignment_gap.sampling import sampler
from alignment_gap.sharding.chips import GIB


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 4], help="numbers of loops")
    flags, words = parser.parse_known_args()
    parsed = read_config(["plan", "--online", "--judge=t5_300k", *words])
    assert parsed is not None
    config = parsed[0]
    (program,) = (each for each in config.programs if each.name == "sampling")
    os.environ.update(environment(config.topology))
    print("| loops | arithmetic, ms a token | HBM | interconnect | at best | peak, GiB | compiled in, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for loops in flags.loops:
        with mock.patch.multiple(sampler, _MOST_LOOPS=loops, _LEAST_TOKENS=1):
            compiled = compile_here(config, program)
        cells = *per_token(config, program, compiled), f"{compiled.peak / GIB:.2f}", f"{compiled.compile_seconds:.0f}"
        print(f"| {loops} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
