"""Whether a job fits a slice and how long its steps take at best: the plan of all programs that it runs.

Offline a step is the update alone, its reference log-probs precomputed with the dataset. Online the step also samples
two responses a prompt, scores them under the reference, and asks the proxy which is better; the golden preference model
judges the same batch. Then all four networks stay in memory together. What an offline run's evaluation does after
training, sampling and labelling, is planned beside the step: one network at a time.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable

from alignment_gap.errors import UserError
from alignment_gap.models import ModelConfig, count_parameters, make_policy
from alignment_gap.plan import flops
from alignment_gap.plan.chips import GIB, TPUS, Topology
from alignment_gap.plan.flops import Lengths
from alignment_gap.plan.programs import Compiled, Request, compile_program
from alignment_gap.plan.roofline import Times, times
from alignment_gap.sharding import LAYOUTS, MeshConfig
from alignment_gap.training import OptimizerConfig

# The paper's lengths: prompts of at most 1024 tokens, responses of 128 (2405.08448).
PAPER = Lengths(batch=512, prompt=1024, samples=2, response=128)
_CONFIRMATIONS = 3


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What is planned.

    Attributes:
      model: the policy.
      topology: the devices.
      mesh: how networks and batches are laid out over them.
      lengths: of a batch, over all devices.
      loss: by name.
      optimizer: of the update step.
      microbatches: of the update step.
      proxy, golden: preference models of the online step; None for the offline one.
      evaluate: whether an offline plan has sampling, and labels by a preference model of the policy's size.
      search: whether the largest batch that fits is looked for.
    """

    model: ModelConfig
    topology: Topology
    mesh: MeshConfig = MeshConfig(layout="fsdp")
    lengths: Lengths = PAPER
    loss: str = "ipo"
    optimizer: OptimizerConfig = OptimizerConfig()
    microbatches: int = 1
    proxy: ModelConfig | None = None
    golden: ModelConfig | None = None
    evaluate: bool = True
    search: bool = True

    @property
    def online(self) -> bool:
        """Whether a step samples."""
        return self.proxy is not None or self.golden is not None


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of a step, or of the evaluation after it.

    Attributes:
      name: such as "proxy labels".
      in_step: whether each step runs it.
      request: what was compiled.
      compiled: what the compiler says.
      model_flops: of one call, over all devices.
      recomputed_flops: what its backward pass computes again.
      times: at best, of one call; None where it does not fit.
      tokens: that it samples one after another; 0 but for the sampler.
      token_seconds: the least time of one of them: parameters and cache read once.
    """

    name: str
    in_step: bool
    request: Request
    compiled: Compiled
    model_flops: float
    recomputed_flops: float
    times: Times | None
    tokens: int = 0
    token_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is found.

    Attributes:
      config: what was planned.
      parts: the programs.
      capacity: bytes of HBM that a device grants.
      resident: bytes of what stays in a device's HBM from step to step, by name.
      working: bytes of the one program of a step that needs most beside that.
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
        """Bytes of a device's HBM: of a step's programs together or of another alone, whatever is more."""
        alone = (part.compiled.peak for part in self.parts if not part.in_step)
        return max(sum(self.resident.values()) + self.working, *alone, 0)

    @property
    def fits(self) -> bool:
        """Whether the device grants them."""
        return self.needed <= self.capacity

    @property
    def step_seconds(self) -> float:
        """Of its programs, one after another, at best; infinite where one cannot be compiled."""
        return sum(part.times.seconds if part.times else math.inf for part in self.parts if part.in_step)

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the devices could do in that time (MFU), an upper bound."""
        done = sum(part.model_flops for part in self.parts if part.in_step)
        return done / (self.step_seconds * self.config.topology.devices * self.config.topology.chip.flops)


Compile = Callable[[Request], Compiled]


def make_plan(config: PlanConfig, compile_: Compile = compile_program, say: Callable[[str], None] = print) -> Plan:
    """Compiles each program of a step and adds up what they need.

    Args:
      config: what is planned.
      compile_: of one program.
      say: is told of each program before it is compiled.

    Raises:
      UserError: where the batch cannot be split over the mesh, or the compiler is not to be had.
    """
    _check(config)
    plan = _at_batch(config, config.lengths.batch, compile_, say)
    if config.search:
        plan = dataclasses.replace(plan, largest_batch=_largest_batch(plan, compile_, say))
    return plan if plan.fits else dataclasses.replace(plan, advice=_advice(plan))


def _check(config: PlanConfig) -> None:
    parts = batch_parts(config)
    if config.lengths.batch % parts:
        raise UserError(
            f"batch is {config.lengths.batch}: the mesh splits it, make it a multiple of {parts}, or take a mesh "
            "with a model axis (--layout=fsdp_tensor, --model_axis=N), over which it is not split"
        )


def batch_parts(config: PlanConfig) -> int:
    """What a batch must be a multiple of."""
    data, fsdp, _ = config.mesh.shape(config.topology.devices)
    return data * fsdp * config.microbatches


def _at_batch(config: PlanConfig, batch: int, compile_: Compile, say: Callable[[str], None]) -> Plan:
    lengths = dataclasses.replace(config.lengths, batch=batch)
    parts = tuple(_part(config, lengths, *each, compile_, say) for each in _programs(config))
    resident = {"policy and optimizer": parts[0].compiled.state}
    for part in parts[1:]:
        if part.in_step and part.request.program != "sample":
            resident[part.name] = part.compiled.parameters
    step = [part for part in parts if part.in_step]
    resident["code"] = sum(part.compiled.code for part in step)
    working = max(_working(part, parts[0].compiled.state) for part in step)
    return Plan(dataclasses.replace(config, lengths=lengths), parts, _capacity(config.topology), resident, working)


def _programs(config: PlanConfig) -> list[tuple[str, bool, str, ModelConfig]]:
    """Name, whether a step runs it, program and network; the update first."""
    programs = [("update", True, "update", config.model)]
    if config.online:
        programs += [("sampling", True, "sample", config.model), ("reference", True, "reference", config.model)]
        judges = (("proxy labels", config.proxy), ("golden labels", config.golden))
        programs += [(name, True, "label", model) for name, model in judges if model]
    elif config.evaluate:
        model = dataclasses.replace(config.model, remat="none")
        programs += [("sampling", False, "sample", config.model), ("labels", False, "label", model)]
    return programs


def _part(
    config: PlanConfig,
    lengths: Lengths,
    name: str,
    in_step: bool,
    program: str,
    model: ModelConfig,
    compile_: Compile,
    say: Callable[[str], None],
) -> Part:
    request = Request(program, model, config.topology, config.mesh, lengths)
    if program == "update":
        request = dataclasses.replace(
            request, loss=config.loss, optimizer=config.optimizer, microbatches=config.microbatches
        )
    say(f"compiling {name} for {config.topology.devices} devices of {config.topology.name}, batch {lengths.batch}")
    compiled = compile_(request)
    counted = _flops(program, model, lengths)
    again = flops.recomputed_flops(model, lengths) if program == "update" else 0.0
    found = None
    if not compiled.exceeded:
        share = (counted + again) / config.topology.devices
        found = times(config.topology.chip, share, compiled.traffic, compiled.collectives)
    token = _token_seconds(config, compiled, lengths) if program == "sample" else 0.0
    return Part(name, in_step, request, compiled, counted, again, found, lengths.response if token else 0, token)


def _flops(program: str, model: ModelConfig, lengths: Lengths) -> float:
    if program == "update":
        return flops.update_flops(model, lengths)
    if program == "label":
        return flops.scores_flops(model, lengths)
    return flops.forward_flops(model, lengths).total


def _token_seconds(config: PlanConfig, compiled: Compiled, lengths: Lengths) -> float:
    """Reading a device's part of the parameters, as the computation takes them, and of the cache once."""
    cache = flops.cache_bytes(config.model, lengths) / config.topology.devices
    parameters = compiled.parameters / (2 if config.model.dtype == "bfloat16" else 1)
    return (parameters + cache) / config.topology.chip.hbm_bandwidth


def _working(part: Part, state: int) -> int:
    """What a program needs beside the networks and the code that stay in memory."""
    held = state if part.request.program == "update" else part.compiled.parameters
    return max(part.compiled.peak - part.compiled.code - held, 0)


def _capacity(topology: Topology) -> float:
    """Of a device; of a virtual one its part of this machine's memory."""
    if topology.kind == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / topology.devices
    return topology.chip.hbm


def _largest_batch(plan: Plan, compile_: Compile, say: Callable[[str], None]) -> int:
    """The largest batch that fits: a line through the memory of two, and each guess compiled before it is believed.

    Only the program of the step that needs most is compiled again; what stays in memory does not depend on the batch.
    """
    unit, first = batch_parts(plan.config), plan.config.lengths.batch
    state = plan.resident["policy and optimizer"]
    binding = max((part for part in plan.parts if part.in_step), key=lambda part: _working(part, state))

    def needed(batch: int) -> int:
        lengths = dataclasses.replace(plan.config.lengths, batch=batch)
        say(f"compiling {binding.name} at batch {batch}, for the largest that fits")
        again = dataclasses.replace(binding, compiled=compile_(dataclasses.replace(binding.request, lengths=lengths)))
        return sum(plan.resident.values()) + _working(again, state)

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
    config, advice = plan.config, []
    if config.model.remat != "full":
        advice.append("--remat=full: activations are computed again in the backward pass instead of kept")
    per_part = config.lengths.batch // batch_parts(config)
    if per_part > 1:
        advice.append(f"--microbatches={config.microbatches * per_part}: gradients of a part of the batch at a time")
    if plan.largest_batch:
        advice.append(f"--batch={plan.largest_batch}: the largest that fits")
    elif per_part > 1:
        advice.append(f"--batch={batch_parts(config)}: the smallest that this mesh takes")
    if config.mesh.layout == "data":
        advice.append("--layout=fsdp: parameters and optimizer state are split over the devices too")
    elif config.mesh.layout == "fsdp" and "fsdp_tensor" in LAYOUTS:
        advice.append("--layout=fsdp_tensor: heads and MLP are split too, and the batch over fewer parts")
    if config.optimizer.name == "adamw":
        saved = 2 * plan.parts[0].compiled.parameters / GIB
        advice.append(f"--optimizer=adafactor: {saved:.1f} GiB less a device, AdamW's two moments")
    if config.model.dtype != "bfloat16":
        advice.append("--dtype=bfloat16: activations take half")
    if config.topology.kind in TPUS:
        share = plan.needed / plan.capacity
        more = 1 << math.ceil(math.log2(share))
        advice.append(f"a slice of {more * config.topology.devices} devices: {share:.1f} times the memory is needed")
    return tuple(advice)


def parameters(config: PlanConfig) -> int:
    """Of the policy."""
    return count_parameters(make_policy(config.model))
