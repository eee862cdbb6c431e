"""Compiles the programs of a job, the same functions that a run calls, for devices that need not be here.

Each program is compiled in its own process, for two reasons. When jax is imported, it reads the variables that let
libtpu compile without a TPU, and the plugin for CUDA without a GPU. And a process that ends returns all its memory.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from alignment_gap.errors import UserError
from alignment_gap.evaluation.metrics import make_divergence
from alignment_gap.jobs.assembly import Assembly
from alignment_gap.jobs.config import JobConfig
from alignment_gap.judges.preference_model import make_scores
from alignment_gap.plan import hlo
from alignment_gap.plan.gpus import TARGETS
from alignment_gap.plan.roofline import Moved, describe
from alignment_gap.plan.steps import SAMPLES, PlanConfig, Program
from alignment_gap.sharding import LogicalMesh, make_mesh, replicated
from alignment_gap.sharding.chips import GPUS, TPUS, Topology
from alignment_gap.training import abstract_base, abstract_params
from alignment_gap.training.flops import count_flops

# With these variables, nothing looks for a TPU or asks the network. The last lets two processes load libtpu.
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


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Figures of a program from jax and the compiler; bytes are per device.

    Attributes:
      parameters: bytes of one network's parameters among the arguments; in an update step, of the trained parameters.
      state: in an update step, bytes of the trained parameters, the optimizer's state and the adapters' base; else 0.
      networks: number of networks whose parameters are among the arguments; each has `parameters` bytes.
      flops: FLOPs of one call, over all devices.
      model_flops: the part of `flops` that the model needs, without recomputation in the backward pass.
      arguments, outputs, aliased, temporaries, code: bytes; arguments and outputs both include the aliased bytes.
      exceeded: bytes that the program needs, if the compiler gave up because they do not fit; the five sizes above and
        the traffic are then 0.
      traffic: bytes that move between chip and HBM in one call.
      collectives: collectives in one call.
      compile_seconds: compile time on this machine.
      host_bytes: peak memory of the compiling process.
      shared: bytes of the parameters that are also the base of the policy's adapters.
    """

    parameters: int
    state: int = 0
    networks: int = 1
    flops: int = 0
    model_flops: int = 0
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
    shared: int = 0

    @property
    def peak(self) -> int:
        """Bytes that the program needs in all."""
        return self.exceeded or self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def compile_program(config: PlanConfig, program: Program) -> Compiled:
    """Compiles a program in its own process; raises UserError if this machine cannot do it."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command = [sys.executable, "-c", "from alignment_gap.plan import programs; programs.main()", str(result)]
        variables = os.environ | environment(config.topology) | {"PYTHONPATH": os.pathsep.join(sys.path)}
        asked = pickle.dumps((config, program))
        done = subprocess.run(command, input=asked, env=variables, capture_output=True)
        if not result.exists():
            what = f"{program.name} on {config.topology.name}"
            raise UserError(_failure(what, done.returncode, done.stderr.decode(errors="replace")))
        found: Compiled | UserError = pickle.loads(result.read_bytes())
    if isinstance(found, UserError):
        raise found
    return found


def main() -> None:
    """Compiles the program that standard input describes, and writes the result to the file in the only argument."""
    found: Compiled | UserError
    try:
        found = compile_here(*pickle.load(sys.stdin.buffer))
    except UserError as error:
        found = error
    Path(sys.argv[1]).write_bytes(pickle.dumps(found))


def environment(topology: Topology) -> dict[str, str]:
    """The variables that a compiling process starts with."""
    # The cache holds programs for this machine's own devices, which are no use here.
    base = {"JAX_COMPILATION_CACHE_DIR": ""}
    if topology.kind in TPUS:
        return base | TPU_VARIABLES | {"XLA_FLAGS": ""}
    if topology.kind == "cpu":
        flags = f"--xla_force_host_platform_device_count={topology.devices}"
        return base | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    # Jax's plugin for CUDA asks for no driver if CUDA is not among the platforms.
    return base | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "TF_CPP_MIN_LOG_LEVEL": "3"}


def _failure(what: str, status: int, text: str) -> str:
    """An error line about a process that ended without a result."""
    if status < 0:
        return f"compiling {what} was killed by signal {-status}: it may need more memory than this machine has free"
    lines = [line for line in text.strip().splitlines() if line.strip()] or ["no message"]
    return f"compiling {what}: {lines[-1][:400]}"


def devices_of(topology: Topology) -> Sequence[Any]:
    """The devices of a topology. libtpu describes TPUs and jax's plugin for CUDA describes GPUs; CPUs are those here.

    Raises:
      UserError: there are too few CPU devices, or what describes the others is not installed.
    """
    if topology.kind == "cpu":
        present = jax.devices("cpu")
        if len(present) < topology.devices:
            raise UserError(f"topology {topology.name}: {len(present)} cpu devices are present")
        return present[: topology.devices]
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.kind == "v4":  # Otherwise its two cores would be two devices.
        options |= {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if topology.kind in GPUS:  # Slices, hosts of each, GPUs of a host.
        options |= {"target_config": TARGETS[topology.kind], "topology": f"1x1x{topology.devices}"}
    try:
        return topologies.get_topology_desc(platform=topology.platform, topology_name=topology.name, **options).devices
    except Exception as error:
        if topology.platform == "cuda" and isinstance(error, NotImplementedError):
            remedy = 'pip install "jax[cuda13-local]"'
            raise UserError(f"jax's plugin for CUDA compiles for GPUs and is not installed: {remedy}") from error
        lacks_libtpu = "libtpu" in str(error).lower() or "not installed" in str(error)
        if topology.platform == "tpu" and (lacks_libtpu or isinstance(error, ModuleNotFoundError)):
            raise UserError('libtpu compiles for TPUs and is not installed: pip install "jax[tpu]"') from error
        raise UserError(
            f"topology {topology.name} is refused by the compiler ({str(error).splitlines()[0]}): give a shape that is "
            f"sold, such as {topology.kind}:{topology.chip.shape}"
        ) from error


def build(program: Program, job: JobConfig, mesh: LogicalMesh) -> tuple[Any, tuple[Any, ...], Any]:
    """The jitted function that a run calls, its abstract arguments, and the argument with the network's parameters."""
    assembly = Assembly(job, program.facts, mesh)
    if program.kind == "update":
        state = assembly.abstract
        return assembly.update_step, (state, assembly.abstract_batch(), *assembly.frozen), state.params
    params = _abstract_whole(program, job, mesh)
    batch = assembly.texts(program.batch)
    prompts, texts = (batch.prompts, batch.prompt_lengths), (batch.responses, batch.response_lengths)
    if program.kind in SAMPLES:
        assert job.online is not None
        generate = assembly.generate(job.online, program.batch.response, opponents=program.kind == "opponents")
        key = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype, sharding=replicated(mesh))
        # The step of all prompts, or of each, which has the form of their numbers.
        one = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
        steps = one if program.steps == 1 else batch.prompt_ids
        reference = [params] if job.online.mixture is not None else []
        return generate, (params, key, steps, batch.prompt_ids, *prompts, *reference), params
    if program.kind == "score":
        return assembly.score, (params, *prompts, *texts), params
    if program.kind == "divergence":
        return make_divergence(assembly.policy, mesh), (params, params, *prompts, *texts), params
    scores = make_scores(program.facts.network.preference_model(), program.labels, mesh)
    return scores, (params, *prompts, *texts), params


def _abstract_whole(program: Program, job: JobConfig, mesh: LogicalMesh) -> Any:
    """Shapes and shardings of a program's parameters; if it uses the adapters' base, this is the base's tree."""
    network = program.facts.network
    if network.adapters is None and not program.shares:
        return abstract_params(network.init, mesh)
    base = _abstract_base(program, job, mesh)
    return base if network.adapters is None else network.adapters.placed(base, abstract_params(network.init, mesh))


def _abstract_base(program: Program, job: JobConfig, mesh: LogicalMesh) -> Any:
    network = program.facts.network
    base_dtype = (network.adapter or job.adapter).base_dtype
    return abstract_base(network.policy(), mesh, base_dtype)


def compile_here(config: PlanConfig, program: Program) -> Compiled:
    """Traces, lowers and compiles in this process."""
    start, job, topology = time.perf_counter(), config.job, config.topology
    mesh = make_mesh(job.mesh, devices_of(topology))
    function, arguments, params = build(program, job, mesh)
    # The base of adapters is in memory too; it is an argument after the batch.
    state = _shard_bytes((arguments[0], arguments[2:])) if program.kind == "update" else 0
    # The same abstract parameters twice mean two networks: the reference has the policy's shapes.
    networks = max(sum(each is params for each in arguments), 1)
    shared = _shard_bytes(_abstract_base(program, job, mesh)) if program.shares else 0
    base = Compiled(_shard_bytes(params), state, networks, *_flops(program, job, mesh), shared=shared)
    try:
        compiled = _compiled(function.trace(*arguments).lower(lowering_platforms=(topology.platform,)))
    except RuntimeError as error:
        if str(error).startswith("cuDNN"):  # It is not found, or not detected.
            what = f"{program.name} on {topology.name}: attention is cudnn, and cuDNN is not installed"
            raise UserError(f'{what}: pip install "jax[cuda13]"') from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        exceeded = exceeded_bytes(str(error), _shard_bytes(arguments))
        return dataclasses.replace(base, exceeded=exceeded, compile_seconds=time.perf_counter() - start)
    memory, instructions = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    return dataclasses.replace(
        base,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        traffic=hlo.hbm_traffic(instructions),
        collectives=describe(hlo.collectives(instructions, mesh.devices.size), mesh.devices, topology),
        compile_seconds=time.perf_counter() - start,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _compiled(lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # On a GPU, XLA measures its own kernels beside those of cuBLAS. Without one, it finds none for some products.
        if "tile sizes" not in str(error):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def _flops(program: Program, job: JobConfig, mesh: LogicalMesh) -> tuple[int, int]:
    """FLOPs of a call, and the part that the model needs: an update's without recomputation in the backward pass."""
    if program.kind == "update":
        assembly = Assembly(job, program.facts, mesh)
        return assembly.update_flops(assembly.abstract_batch())
    facts = program.facts.with_plain_attention()
    function, arguments, _ = build(dataclasses.replace(program, facts=facts), job, mesh)
    flops = count_flops(function.trace(*arguments).jaxpr)
    return flops, flops


def _shard_bytes(tree: Any) -> int:
    """Bytes of a device's part of abstract arrays; random keys are small and not counted."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def exceeded_bytes(message: str, arguments: int) -> int:
    """The total bytes that a program needs, from the compiler's out-of-memory message."""
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
