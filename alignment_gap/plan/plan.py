"""The plan of a job: whether its programs fit its devices, and how long its steps take at best.

`steps.programs_of` gives the programs. An online step samples, asks the judge and the reference, and updates the
policy. An offline step updates the policy, and asks the reference if its log-probs are not stored. All networks of a
step are in memory at the same time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import jax

from alignment_gap.models import compute_params
from alignment_gap.plan.programs import Compiled, compile_program
from alignment_gap.plan.roofline import Times, times
from alignment_gap.plan.steps import SAMPLES, PlanConfig, Program
from alignment_gap.sampling import SamplerConfig, loop_weights
from alignment_gap.sharding import check_batch_size, unbox
from alignment_gap.sharding.chips import GIB, GPUS, GPUS_OF_A_HOST, TPUS, Topology

_CONFIRMATIONS = 3


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of a step.

    Attributes:
      program: the program.
      compiled: the compiler's figures.
      times: the times of one call, at best; None if the program does not fit.
      token_seconds: for a sampler, the time to read parameters and cache once, which is the minimum for each token;
        else 0.
    """

    program: Program
    compiled: Compiled
    times: Times | None
    token_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        """The number of tokens that it samples one after another; 0 if it does not sample."""
        return self.program.batch.response if self.program.kind in SAMPLES else 0

    @property
    def working(self) -> int:
        """Bytes that it needs in addition to the networks and the code that stay in memory."""
        held = self.compiled.state or self.compiled.networks * self.compiled.parameters
        return max(self.compiled.peak - self.compiled.code - held, 0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The result of planning.

    Attributes:
      config: the planned job and hardware.
      parts: the programs.
      capacity: bytes of HBM that a program can use on a device.
      resident: bytes that stay in a device's HBM from step to step, by name.
      working: additional bytes that the most demanding program needs.
      largest_batch: the largest batch that fits; 0 if none does, None without a search.
      advice: changes that would help if the job does not fit.
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
        """Bytes of a device's HBM that the programs of a step need together."""
        return sum(self.resident.values()) + self.working

    @property
    def fits(self) -> bool:
        """Whether a device has the bytes that are needed."""
        return self.needed <= self.capacity

    @property
    def step_seconds(self) -> float:
        """The time of a step's programs, one after another, at best; infinite if one does not fit."""
        return sum(part.times.seconds / part.program.steps if part.times else math.inf for part in self.parts)

    @property
    def job_seconds(self) -> float | None:
        """The time of the whole job at best; None if the calls of a program are not known."""
        calls = [part.program.calls for part in self.parts]
        seconds = [part.times.seconds if part.times else math.inf for part in self.parts]
        return None if None in calls else sum(n * each for n, each in zip(calls, seconds, strict=True) if n)

    @property
    def utilisation(self) -> float:
        """Model FLOPs / the FLOPs that the devices could do in the step's time (MFU); an upper bound."""
        done = sum(part.compiled.model_flops / part.program.steps for part in self.parts)
        return done / (self.step_seconds * self.config.topology.devices * self.config.topology.chip.flops)


Compile = Callable[[PlanConfig, Program], Compiled]


def make_plan(config: PlanConfig, compile_: Compile = compile_program) -> Plan:
    """Compiles each program of a step and adds up what the programs need.

    Args:
      config: the job and hardware to plan.
      compile_: compiles one program; `kept.kept` says what it compiles.

    Raises:
      UserError: the mesh cannot split the batch, or the compiler is not available.
    """
    check_batches(config)
    parts = tuple(_part(config, program, compile_) for program in config.programs)
    first = parts[0].compiled
    resident = {"policy and optimizer": first.state} if first.state else {}
    held = [part for part in parts if part.program.holds]
    resident |= {part.program.name: part.compiled.parameters - part.compiled.shared for part in held}
    resident["code"] = sum(part.compiled.code for part in parts)
    plan = Plan(config, parts, _capacity(config.topology), resident, max(part.working for part in parts))
    if config.search:
        plan = dataclasses.replace(plan, largest_batch=_largest_batch(plan, compile_))
    return plan if plan.fits else dataclasses.replace(plan, advice=_advice(plan))


def check_batches(config: PlanConfig) -> None:
    """Raises UserError if the mesh cannot split the batch of a program."""
    for program in config.programs:
        check_batch_size("batch", program.batch.batch, config.batch_unit)


def _part(config: PlanConfig, program: Program, compile_: Compile) -> Part:
    topology = config.topology
    compiled = compile_(config, program)
    found = None
    if not compiled.exceeded:
        share = compiled.flops / topology.devices
        found = times(topology.chip, share, compiled.traffic, compiled.collectives)
    return Part(program, compiled, found, _token_seconds(config, program, compiled))


def _token_seconds(config: PlanConfig, program: Program, compiled: Compiled) -> float:
    """Seconds to read a device's part of the parameters, in the computation's dtype, and of the cache once."""
    if program.kind not in SAMPLES:
        return 0.0
    assert config.job.online is not None
    topology, sampler = config.topology, config.job.online.sampler
    parameters = float(compiled.parameters)
    if program.facts.network.adapter is None:
        parameters *= _share_read(program, sampler) / (2 if program.model.dtype == "bfloat16" else 1)
    cache = cache_bytes(program, sampler.prompt_cache_dtype) / topology.devices
    return (parameters + cache) / topology.chip.hbm_bandwidth


def _share_read(program: Program, sampler: SamplerConfig) -> float:
    """Bytes of the weights that the sampler's loop reads, over those of the weights of the computation."""
    policy = program.facts.network.policy()
    cast = jax.eval_shape(lambda: compute_params(policy, unbox(policy.init(jax.random.key(0)))))
    read = jax.eval_shape(lambda params: loop_weights(policy, params, sampler), cast)
    return _bytes(read) / _bytes(cast)


def cache_bytes(program: Program, prompt_cache_dtype: str | None = None) -> int:
    """Bytes of a sampler's cache, over all devices."""
    shape, policy = program.batch, program.facts.network.policy()

    def cache() -> object:
        prompts, lengths = (jax.numpy.zeros(sizes, int) for sizes in ((shape.batch, shape.prompt), (shape.batch,)))
        params = unbox(policy.init(jax.random.key(0)))
        return policy.prefill(params, prompts, lengths, shape.samples, shape.response, prompt_cache_dtype)

    return _bytes(jax.eval_shape(cache))


def _bytes(tree: object) -> int:
    """Bytes of abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _capacity(topology: Topology) -> float:
    """Bytes that a device has; a virtual CPU device has its part of this machine's memory."""
    if topology.kind == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / topology.devices
    return topology.chip.hbm


def _largest_batch(plan: Plan, compile_: Compile) -> int:
    """The largest batch that fits; every program is compiled with it to confirm it.

    The memory that stays does not depend on the batch. So the search compiles only the program that needs most besides,
    and then the others with the batch that it found. If one of them does not fit, the search goes on with that one.
    """
    unit, first = plan.config.batch_unit, plan.config.programs[0].batch.batch
    resident = sum(plan.resident.values())

    @functools.cache
    def needed(place: int, batch: int) -> int:
        part = plan.parts[place]
        compiled = part.compiled if batch == first else compile_(plan.config, part.program.with_batch(batch))
        return resident + dataclasses.replace(part, compiled=compiled).working

    def neediest(batch: int) -> int:
        return max(range(len(plan.parts)), key=lambda place: needed(place, batch))

    binding = neediest(first)
    known = at_first = {first: needed(binding, first)}
    while found := _search(known, functools.partial(needed, binding), plan.capacity, unit):
        binding = neediest(found)
        if needed(binding, found) <= plan.capacity:
            return found
        # This batch does not fit, so the next search finds a smaller one.
        known = at_first | {found: needed(binding, found)}
    return 0


def _search(known: dict[int, int], needed: Callable[[int], int], capacity: float, unit: int) -> int:
    """The largest batch that fits, of those whose needs are known and a few guesses; 0 if none does."""
    known = dict(known)
    for _ in range(_CONFIRMATIONS + 1):
        guess = _guess(known, capacity, unit)
        if guess in known or guess < unit:
            break
        known[guess] = needed(guess)
    return max((batch for batch in known if known[batch] <= capacity), default=0)


def _guess(known: dict[int, int], capacity: float, unit: int) -> int:
    """The batch at which a line through the two batches nearest to the capacity reaches it; at first, twice or half."""
    if len(known) == 1:
        ((first, need),) = known.items()
        return 2 * first if need <= capacity else max(first // 2 // unit, 1) * unit
    (first, low), (second, high) = sorted(sorted(known.items(), key=lambda each: abs(each[1] - capacity))[:2])
    slope = (high - low) / max(second - first, 1)
    guess = int((first + (capacity - low) / slope) // unit) * unit if slope > 0 else second * 2
    fit = max((batch for batch in known if known[batch] <= capacity), default=0)
    too_large = min((batch for batch in known if known[batch] > capacity), default=0)
    return min(max(guess, fit + unit), too_large - unit) if too_large else guess


def _advice(plan: Plan) -> tuple[str, ...]:
    """Settings that would help, the smallest change first."""
    config, first, advice = plan.config, plan.config.programs[0], list[str]()
    job, unit, is_update = config.job, config.batch_unit, first.kind == "update"
    per_part = first.batch.batch // unit
    if is_update and first.model.remat != "full":
        advice.append("--remat=full: the backward pass recomputes activations instead of keeping them")
    if is_update and per_part > 1:
        advice.append(f"--microbatches={job.microbatches * per_part}: gradients for a part of the batch at a time")
    if plan.largest_batch:
        advice.append(f"--batch={plan.largest_batch}: the largest that fits")
    elif per_part > 1:
        advice.append(f"--batch={unit}: the smallest batch that this mesh can split")
    if job.mesh.layout == "data" and config.topology.devices > 1:
        advice.append("--layout=fsdp: also splits parameters and optimizer state over the devices")
    elif job.mesh.layout == "fsdp":
        advice.append("--layout=fsdp_tensor: also splits heads and MLP, and splits the batch into fewer parts")
    if is_update and job.optimizer.name == "adamw":
        saved = 2 * plan.parts[0].compiled.parameters / GIB
        advice.append(f"--optimizer=adafactor: saves {saved:.1f} GiB per device, AdamW's two moments")
    if first.model.dtype != "bfloat16":
        advice.append("--dtype=bfloat16: halves the memory of activations")
    share = plan.needed / plan.capacity
    devices = config.topology.devices << math.ceil(math.log2(share))
    if config.topology.kind in TPUS:
        advice.append(f"a slice of {devices} devices: the job needs {share:.1f} times the memory of this slice")
    elif config.topology.kind in GPUS and devices <= GPUS_OF_A_HOST:
        more = f"--topology={config.topology.kind}:{devices}"
        advice.append(f"{more}: the job needs {share:.1f} times the memory of these GPUs")
    return tuple(advice)
