"""Whether a job fits a slice and how long its steps take at best: the plan of all programs that it runs.

The programs are those of `steps.programs_of`. An online step samples, asks the judge and the reference, and updates
the policy. An offline one updates, and asks the reference where its log-probs are not stored. All networks of a step
stay in memory together.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable

import jax

from alignment_gap.plan.programs import Compiled, compile_program
from alignment_gap.plan.roofline import Times, times
from alignment_gap.plan.steps import SAMPLES, PlanConfig, Program
from alignment_gap.sharding import check_batch_size, unbox
from alignment_gap.sharding.chips import GIB, TPUS, Topology

_CONFIRMATIONS = 3


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of a step.

    Attributes:
      program: the program.
      compiled: what the compiler says.
      times: of one call at best; None where it does not fit.
      token_seconds: of a sampler, the time to read parameters and cache once, which each token takes at least; else 0.
    """

    program: Program
    compiled: Compiled
    times: Times | None
    token_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """The tokens that it samples one after another; 0 where it samples none."""
        return self.program.batch.response if self.program.kind in SAMPLES else 0

    @property
    def working(self) -> int:
        """Bytes that it needs beside the networks and the code that stay in memory."""
        held = self.compiled.state or self.compiled.networks * self.compiled.parameters
        return max(self.compiled.peak - self.compiled.code - held, 0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is found.

    Attributes:
      config: what was planned.
      parts: the programs.
      capacity: bytes of HBM that a device grants.
      resident: bytes of what stays in a device's HBM from step to step, by name.
      working: bytes that the program which needs most has beside those.
      largest_batch: that fits; 0 where none does, None where it was not looked for.
      advice: what would help, where it does not fit.
    """

    config: PlanConfig
    parts: tuple[Part, ...]
    capacity: float
    resident: dict[str, int]
    working: int
    largest_batch: int | None = None
    advice: tuple[str, ...] = ()

    @property
    def needed(self) -> int:
        """Bytes of a device's HBM that a step's programs need together."""
        return sum(self.resident.values()) + self.working

    @property
    def fits(self) -> bool:
        """Whether the device grants them."""
        return self.needed <= self.capacity

    @property
    def step_seconds(self) -> float:
        """The time of its programs, one after another, at best; infinite where one cannot be compiled."""
        return sum(part.times.seconds if part.times else math.inf for part in self.parts)

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the devices could do in that time (MFU), an upper bound."""
        done = sum(part.compiled.model_flops for part in self.parts)
        return done / (self.step_seconds * self.config.topology.devices * self.config.topology.chip.flops)


Compile = Callable[[PlanConfig, Program], Compiled]


def make_plan(config: PlanConfig, compile_: Compile = compile_program, say: Callable[[str], None] = print) -> Plan:
    """Compiles each program of a step and adds up what they need.

    Args:
      config: what is planned.
      compile_: compiles one program.
      say: is told of each program before it is compiled.

    Raises:
      UserError: where the batch cannot be split over the mesh, or the compiler is not to be had.
    """
    for program in config.programs:
        check_batch_size("batch", program.batch.batch, config.batch_unit)
    parts = tuple(_part(config, program, compile_, say) for program in config.programs)
    first = parts[0].compiled
    resident = {"policy and optimizer": first.state} if first.state else {}
    held = [part for part in parts if part.program.holds]
    resident |= {part.program.name: part.compiled.parameters - part.compiled.shared for part in held}
    resident["code"] = sum(part.compiled.code for part in parts)
    plan = Plan(config, parts, _capacity(config.topology), resident, max(part.working for part in parts))
    if config.search:
        plan = dataclasses.replace(plan, largest_batch=_largest_batch(plan, compile_, say))
    return plan if plan.fits else dataclasses.replace(plan, advice=_advice(plan))


def _part(config: PlanConfig, program: Program, compile_: Compile, say: Callable[[str], None]) -> Part:
    topology = config.topology
    say(f"compiling {program.name} for {topology.devices} devices of {topology.name}, batch {program.batch.batch}")
    compiled = compile_(config, program)
    found = None
    if not compiled.exceeded:
        share = compiled.flops / topology.devices
        found = times(topology.chip, share, compiled.traffic, compiled.collectives)
    return Part(program, compiled, found, _token_seconds(program, topology, compiled))


def _token_seconds(program: Program, topology: Topology, compiled: Compiled) -> float:
    """Reading a device's part of the parameters, as the computation takes them, and of the cache once."""
    if program.kind not in SAMPLES:
        return 0.0
    is_cast = program.model.dtype == "bfloat16" and program.facts.network.adapter is None
    parameters = compiled.parameters / (2 if is_cast else 1)
    return (parameters + cache_bytes(program) / topology.devices) / topology.chip.hbm_bandwidth


def cache_bytes(program: Program) -> int:
    """Bytes of a sampler's cache, over all devices."""
    shape, policy = program.batch, program.facts.network.policy()

    def cache() -> object:
        prompts, lengths = (jax.numpy.zeros(sizes, int) for sizes in ((shape.batch, shape.prompt), (shape.batch,)))
        return policy.prefill(unbox(policy.init(jax.random.key(0))), prompts, lengths, shape.samples, shape.response)

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(cache)))


def _capacity(topology: Topology) -> float:
    """Of a device; of a virtual one its part of this machine's memory."""
    if topology.kind == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / topology.devices
    return topology.chip.hbm


def _largest_batch(plan: Plan, compile_: Compile, say: Callable[[str], None]) -> int:
    """The largest batch that fits: a line through the memory of two, and each guess compiled before it is believed.

    Only the program of the step that needs most is compiled again; what stays in memory does not depend on the batch.
    """
    unit, first = plan.config.batch_unit, plan.config.programs[0].batch.batch
    binding = max(plan.parts, key=lambda part: part.working)

    def needed(batch: int) -> int:
        say(f"compiling {binding.program.name} at batch {batch}, for the largest that fits")
        compiled = compile_(plan.config, binding.program.with_batch(batch))
        return sum(plan.resident.values()) + dataclasses.replace(binding, compiled=compiled).working

    known = {first: sum(plan.resident.values()) + plan.working}
    guess = 2 * first if known[first] <= plan.capacity else max(first // 2 // unit, 1) * unit
    for _ in range(_CONFIRMATIONS + 1):
        if guess in known or guess < unit:
            break
        known[guess] = needed(guess)
        low = max((batch for batch in known if known[batch] <= plan.capacity), default=0)
        high = min((batch for batch in known if known[batch] > plan.capacity), default=0)
        guess = _guess(known, plan.capacity, unit)
        if high:
            guess = min(max(guess, low + unit), high - unit)
    return max((batch for batch in known if known[batch] <= plan.capacity), default=0)


def _guess(known: dict[int, int], capacity: float, unit: int) -> int:
    """Where a line through the two batches nearest to the capacity meets it."""
    (first, low), (second, high) = sorted(sorted(known.items(), key=lambda each: abs(each[1] - capacity))[:2])
    slope = (high - low) / max(second - first, 1)
    return int((first + (capacity - low) / slope) // unit) * unit if slope > 0 else second * 2


def _advice(plan: Plan) -> tuple[str, ...]:
    """Settings that would help, those that change least first."""
    config, first, advice = plan.config, plan.config.programs[0], list[str]()
    job, unit, is_update = config.job, config.batch_unit, first.kind == "update"
    per_part = first.batch.batch // unit
    if is_update and first.model.remat != "full":
        advice.append("--remat=full: activations are computed again in the backward pass instead of kept")
    if is_update and per_part > 1:
        advice.append(f"--microbatches={job.microbatches * per_part}: gradients of a part of the batch at a time")
    if plan.largest_batch:
        advice.append(f"--batch={plan.largest_batch}: the largest that fits")
    elif per_part > 1:
        advice.append(f"--batch={unit}: the smallest that this mesh takes")
    if job.mesh.layout == "data":
        advice.append("--layout=fsdp: parameters and optimizer state are split over the devices too")
    elif job.mesh.layout == "fsdp":
        advice.append("--layout=fsdp_tensor: heads and MLP are split too, and the batch over fewer parts")
    if is_update and job.optimizer.name == "adamw":
        saved = 2 * plan.parts[0].compiled.parameters / GIB
        advice.append(f"--optimizer=adafactor: {saved:.1f} GiB less a device, AdamW's two moments")
    if first.model.dtype != "bfloat16":
        advice.append("--dtype=bfloat16: activations take half")
    if config.topology.kind in TPUS:
        share = plan.needed / plan.capacity
        devices = config.topology.devices << math.ceil(math.log2(share))
        advice.append(f"a slice of {devices} devices: {share:.1f} times the memory is needed")
    return tuple(advice)
