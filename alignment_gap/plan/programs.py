"""The programs of a job, the very functions that a run calls, compiled for devices that need not be here.

Run as a module in a process of its own: `python -m alignment_gap.plan.programs RESULT < REQUEST`. The variables that
let libtpu compile without a TPU are read when jax is imported, and a process gives all its memory back.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from alignment_gap import losses
from alignment_gap.configuration import from_dict
from alignment_gap.data.batches.batch import PreferenceBatch
from alignment_gap.errors import UserError
from alignment_gap.models import ModelConfig, PreferenceModel, make_policy
from alignment_gap.models.preference import Markers
from alignment_gap.plan import hlo
from alignment_gap.plan.chips import TPUS, Topology
from alignment_gap.plan.flops import Lengths
from alignment_gap.plan.roofline import Moved, describe
from alignment_gap.sampling import SamplerConfig, make_generate
from alignment_gap.sharding import LogicalMesh, MeshConfig, batch_sharding, make_mesh, replicated, within
from alignment_gap.training import (
    OptimizerConfig,
    abstract_params,
    abstract_state,
    make_optimizer,
    make_score,
    make_update_step,
    policy_objective,
)

# Nothing of these reaches for a TPU or for the network; without the last, two processes cannot both load libtpu.
TPU_VARIABLES = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
MARKER_IDS = (2, 3, 4, 5, 6)


@dataclasses.dataclass(frozen=True)
class Request:
    """One program for one topology.

    Attributes:
      program: "update", "reference", "sample" or "label"; the last is a preference model's scoring.
      model: the network.
      topology: the devices.
      mesh: how it is laid out over them.
      lengths: shape of a batch.
      loss: by name, of the update step.
      optimizer: of the update step.
      microbatches: of the update step.
    """

    program: str
    model: ModelConfig
    topology: Topology
    mesh: MeshConfig
    lengths: Lengths
    loss: str = "ipo"
    optimizer: OptimizerConfig = OptimizerConfig()
    microbatches: int = 1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program, per device.

    Attributes:
      parameters: bytes of the network's parameters among the arguments.
      state: those and the optimizer's of the update step, whose result takes their place; 0 for other programs.
      arguments, outputs, aliased, temporaries, code: bytes; what is aliased is among arguments and outputs both.
      exceeded: bytes of what did not fit where the compiler gave up, else 0; the other figures are then 0.
      traffic: bytes that move between chip and HBM in one call.
      collectives: in one call.
      compile_seconds: on this machine.
      host_bytes: the most memory that the compiling process held.
    """

    parameters: int
    state: int = 0
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    exceeded: int = 0
    traffic: int = 0
    collectives: tuple[Moved, ...] = ()
    compile_seconds: float = 0.0
    host_bytes: int = 0

    @property
    def peak(self) -> int:
        """Bytes that the program needs in all."""
        return self.exceeded or self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def compile_program(request: Request) -> Compiled:
    """Compiles in a process of its own, once for equal requests; raises UserError where that cannot be done here."""
    return _compile(json.dumps(dataclasses.asdict(request)), request.program, request.topology)


@functools.cache
def _compile(request: str, program: str, topology: Topology) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "alignment_gap.plan.programs", str(result)]
        root = str(Path(__file__).parents[2])
        search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        variables = os.environ | {"PYTHONPATH": search} | environment(topology)
        done = subprocess.run(command, input=request, env=variables, capture_output=True, text=True)
        if done.returncode or not result.exists():
            raise UserError(_failure(f"{program} on {topology.name}", done.returncode, done.stderr))
        return read_compiled(result)


def read_compiled(path: Path) -> Compiled:
    """What was written as JSON."""
    values = json.loads(path.read_text())
    values["collectives"] = tuple(Moved(**each) for each in values["collectives"])
    return Compiled(**values)


def environment(topology: Topology) -> dict[str, str]:
    """The variables that a compiling process starts with."""
    # A cache of compiled programs of this machine's own devices would be of no use to it.
    base = {"JAX_COMPILATION_CACHE_DIR": ""}
    if topology.kind in TPUS:
        return base | TPU_VARIABLES | {"XLA_FLAGS": ""}
    if topology.kind == "cpu":
        return base | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={topology.devices}",
        }
    return base | {"JAX_PLATFORMS": "cuda"}


def _failure(what: str, status: int, text: str) -> str:
    if status < 0:
        return f"compiling {what} was killed by signal {-status}: it may need more memory than this machine has free"
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["no message"]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])
    return said.removeprefix("error: ")[:400] if said.startswith("error: ") else f"compiling {what}: {said[:400]}"


def devices_of(topology: Topology) -> Sequence[Any]:
    """The devices of a topology; described by libtpu where they are TPUs, else those of this machine.

    Raises:
      UserError: where they are not to be had here.
    """
    if topology.kind not in TPUS:
        try:
            present = jax.devices(topology.kind)
        except (AssertionError, RuntimeError) as error:  # jax asserts where the only platform asked for has no plugin.
            raise UserError(
                f"topology {topology.name}: jax finds no {topology.kind} device here, and plans for {topology.kind} "
                "compile on the machine itself; TPUs need none"
            ) from error
        if len(present) < topology.devices:
            raise UserError(f"topology {topology.name}: {len(present)} {topology.kind} devices are present")
        return present[: topology.devices]
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind == "v4":  # Else its two cores are two devices.
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except Exception as error:
        first = str(error).splitlines()[0]
        if "libtpu" in str(error).lower() or "not installed" in str(error) or isinstance(error, ModuleNotFoundError):
            raise UserError("libtpu compiles for TPUs and is not installed: pip install alignment-gap[tpu]") from error
        raise UserError(f"topology {topology.name}: {first}") from error


def build(request: Request, mesh: LogicalMesh) -> tuple[Callable[..., Any], tuple[Any, ...], Any]:
    """The jitted function, its abstract arguments, and the network's parameters among them."""

    def array(*shape: int, dtype: Any = jnp.int32, whole: bool = False) -> jax.ShapeDtypeStruct:
        sharding = replicated(mesh) if whole else batch_sharding(mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    policy, lengths = make_policy(request.model), request.lengths
    batch, samples, response = lengths.batch, lengths.samples, lengths.response
    prompts = array(batch, lengths.prompt), array(batch)
    texts: Any = (*prompts, array(batch, samples, response), array(batch, samples))
    if request.program == "update":
        optimizer = make_optimizer(request.optimizer)
        state = abstract_state(policy.init, optimizer, mesh)
        objective = policy_objective(policy, losses.get(request.loss))
        step = make_update_step(objective, optimizer, mesh, state, microbatches=request.microbatches)
        scores: Any = array(batch, samples, dtype=jnp.float32), array(batch, samples, response, dtype=jnp.float32)
        ids: Any = array(batch)
        return step, (state, PreferenceBatch(ids, *texts, *scores)), state.params
    params = abstract_params(policy.init, mesh)
    if request.program == "sample":
        generate = make_generate(policy, mesh, samples=samples, max_length=response, eos_id=1, config=SamplerConfig())
        key = jax.eval_shape(lambda: jax.random.key(0))
        run = array(dtype=key.dtype, whole=True), array(whole=True)
        return generate, (params, *run, array(batch), *prompts), params
    if request.program == "reference":
        return make_score(policy, mesh), (params, *texts), params
    model = PreferenceModel(policy, Markers(*MARKER_IDS))
    return jax.jit(within(mesh, model.scores), out_shardings=batch_sharding(mesh)), (params, *texts), params


def compile_here(request: Request) -> Compiled:
    """Lowers and compiles in this process."""
    start = time.perf_counter()
    mesh = make_mesh(request.mesh, devices_of(request.topology))
    function, arguments, params = build(request, mesh)
    state = _shard_bytes(arguments[0]) if request.program == "update" else 0
    base = Compiled(_shard_bytes(params), state)
    platform = "tpu" if request.topology.kind in TPUS else request.topology.kind
    lowered = function.trace(*arguments).lower(lowering_platforms=(platform,))  # type: ignore[attr-defined]
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        exceeded = exceeded_bytes(str(error), _shard_bytes(arguments))
        return dataclasses.replace(base, exceeded=exceeded, compile_seconds=time.perf_counter() - start)
    memory, program = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    return dataclasses.replace(
        base,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        traffic=hlo.hbm_traffic(program),
        collectives=describe(hlo.collectives(program, mesh.devices.size), mesh.devices, request.topology),
        compile_seconds=time.perf_counter() - start,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _shard_bytes(tree: Any) -> int:
    """Bytes of a device's part of abstract arrays; random keys among them are a few and not counted."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def exceeded_bytes(message: str, arguments: int) -> int:
    """What a program needs in all, from the compiler's words where it ran out of memory."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    patterns = (
        (r"[Tt]otal hbm usage >= ([\d.]+)([KMGT]?)", 0),
        (r"Used ([\d.]+)([KMGT]?) of", 0),
        (r"HLO temporaries \(([\d.]+)([KMGT]?)\)", arguments),
    )
    for pattern, beside in patterns:
        if found := re.search(pattern, message):
            return int(float(found[1]) * units[found[2]]) + beside
    raise UserError(f"the compiler ran out of memory without a figure: {message.splitlines()[0][:300]}")


def main() -> None:
    """Compiles the request on standard input and writes what came of it to the file named by the only argument."""
    try:
        request = from_dict(Request, json.load(sys.stdin), path="request")
        Path(sys.argv[1]).write_text(json.dumps(dataclasses.asdict(compile_here(request))))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
