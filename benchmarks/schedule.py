"""The schedule of an online step: what longer periods between refreshes, or a second slice for sampling, can gain.

    python benchmarks/schedule.py t5_xxl 16x16 8
    python benchmarks/schedule.py t5_large 4x8 32

The arguments are a policy, a v5e slice, and the prompts of a step. Compiles the programs of an online IPO step with the
mesh of configs/study/pod.py, prompts of 1024 tokens and two responses of 128, for the slice and for half of it; and the
sampler for the prompts of several steps at once. Prints, in milliseconds of a step at best:

- the programs of a step, one after another, on the slice;
- sampling for 2, 4 and 8 steps in one call, for each step. The parameters of these steps must be the same, so
  `refresh_every` is at least as large;
- half of the slice for sampling and the other half for everything else at the same time. The samples are then of a
  policy that is at least a step older. Moving parameters from half to half is not counted.

No TPU is needed. Each program takes minutes on two cores; the compiler's figures are kept in .cache/plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from alignment_gap.cli.plan import read_config
from alignment_gap.plan.kept import kept
from alignment_gap.plan.plan import Plan, make_plan
from alignment_gap.plan.steps import SAMPLES, PlanConfig
from alignment_gap.sharding import MeshConfig
from alignment_gap.sharding.chips import GIB

KEPT = Path(".cache/plan")
STEPS = (2, 4, 8)


def config_of(model: str, shape: str, batch: int) -> PlanConfig:
    """The programs of an online step on a v5e slice, with the mesh of the study on a pod."""
    words = [f"--model={model}", f"--topology=v5e:{shape}", f"--batch={batch}", "--online", "--judge=t5_large"]
    parsed = read_config(["plan", *words, "--prompt_length=1024", "--response_length=128", "--nosearch"])
    assert parsed is not None
    mesh = MeshConfig(layout="fsdp_tensor", fsdp=8, model=-1)
    return dataclasses.replace(parsed[0], job=dataclasses.replace(parsed[0].job, mesh=mesh))


def half(shape: str) -> str:
    """The shape of half of a slice: 8x16 for 16x16."""
    first, second = sorted(map(int, shape.split("x")))
    return f"{first}x{second // 2}" if first * 2 <= second else f"{first // 2}x{second}"


def only_sampler(config: PlanConfig, steps: int) -> PlanConfig:
    """The same plan with the sampler alone, which draws for some steps at once."""
    (sampler,) = (each for each in config.programs if each.kind in SAMPLES)
    return dataclasses.replace(config, programs=(sampler.with_draws(steps),))


def cells(plan: Plan) -> dict[str, str]:
    """Milliseconds of each program at best, with what bounds it."""
    return {
        part.program.name: f"{1e3 * part.times.seconds:.0f} ({part.times.bound})" if part.times else "does not fit"
        for part in plan.parts
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("slice", metavar="SLICE", help="the shape of a v5e slice, such as 16x16")
    parser.add_argument("batch", type=int, help="prompts of a step")
    flags = parser.parse_args()
    compile_ = kept(KEPT, lambda line: print(line, flush=True))
    config, smaller = (config_of(flags.model, shape, flags.batch) for shape in (flags.slice, half(flags.slice)))
    whole, halves = make_plan(config, compile_), make_plan(smaller, compile_)
    print("\n| slice | " + " | ".join(cells(whole)) + " | all, one after another |")
    print("|" + " --- |" * (len(cells(whole)) + 2))
    for plan in (whole, halves):
        name = plan.config.topology.name
        print(f"| {name} | " + " | ".join(cells(plan).values()) + f" | {1e3 * plan.step_seconds:.0f} |", flush=True)
    sampling = sum(part.times.seconds for part in halves.parts if part.program.kind in SAMPLES and part.times)
    both = max(sampling, halves.step_seconds - sampling)
    print(f"\ntwo halves at the same time: {1e3 * both:.0f} ms, {both / whole.step_seconds:.2f} of the whole slice\n")
    print("| steps in a call | sampling a step | all a step | over one | sampler's peak, GiB |")
    print("| --- | --- | --- | --- | --- |")
    (first,) = (part for part in whole.parts if part.program.kind in SAMPLES)
    for steps in (1, *STEPS):
        drawing = make_plan(only_sampler(config, steps), compile_)
        (part,) = drawing.parts
        if part.times is None or first.times is None:
            print(f"| {steps} | does not fit | | | |")
            continue
        each = drawing.step_seconds
        step = whole.step_seconds - first.times.seconds + each
        peak = part.compiled.peak / GIB
        row = f"{1e3 * each:.0f} ({part.times.bound}) | {1e3 * step:.0f} | {step / whole.step_seconds:.2f} | {peak:.1f}"
        print(f"| {steps} | {row} |", flush=True)


if __name__ == "__main__":
    main()
