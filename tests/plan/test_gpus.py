"""Programs compiled for GPUs that are not there."""

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys

import jax
import pytest
from planning import DECODER, config_of, program_of

from alignment_gap.errors import UserError
from alignment_gap.plan import programs
from alignment_gap.plan.gpus import TARGETS
from alignment_gap.plan.programs import compile_program, devices_of, environment
from alignment_gap.sharding.chips import GPUS, parse_topology

EIGHT = parse_topology("h100:8")
# The traffic of products of 4096 x 512 and 512 x 1024 in bfloat16, with another factor in each of six rounds of a loop.
# The result has more tiles than the GPU has cores, so no core computes only a part of a sum.
LOOP = """
import jax, jax.numpy as jnp
from alignment_gap.plan import hlo
from alignment_gap.plan.programs import devices_of
from alignment_gap.sharding.chips import DEVICE_KINDS, GPUS, parse_topology

def rounds(x, factors):
    return jax.lax.scan(lambda total, factor: (total + x @ factor, None), jnp.zeros((4096, 1024), x.dtype), factors)[0]

for name in GPUS:
    (device,) = devices_of(parse_topology(f"{name}:1"))
    assert DEVICE_KINDS[device.device_kind] == name, device
    whole = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in ((4096, 512), (6, 512, 1024))]
    compiled = jax.jit(rounds).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
    print(hlo.hbm_traffic(hlo.parse(compiled.as_text())))
"""


@pytest.fixture
def plugin():
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("jax's plugin for CUDA, which compiles for GPUs, is not installed")


def test_every_gpu_has_a_target():
    assert TARGETS.keys() == set(GPUS)


@pytest.mark.slow
def test_an_update_over_the_gpus_of_a_host(plugin, compiled):
    update = program_of("update")
    found, here = compile_program(config_of(update, topology=EIGHT), update), compiled("update")
    assert (found.parameters, found.state, found.flops) == (here.parameters, here.state, here.flops)
    assert found.aliased == found.state
    assert {each.axes for each in found.collectives} == {"fsdp"}
    # Every part of the state is read and written.
    assert found.traffic > 2 * found.state


@pytest.mark.slow
def test_traffic_of_a_loop_of_products(plugin):
    """Each round copies its factor, and reads the copy and x. It reads and writes the total, zeros at first."""
    variables = os.environ | environment(EIGHT) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LOOP], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x, factor, total = (2 * rows * columns for rows, columns in ((4096, 512), (512, 1024), (4096, 1024)))
    found = [int(word) for word in done.stdout.split()]
    assert len(found) == len(GPUS)
    for traffic in found:
        # A few bytes are the loop's counter.
        assert 0 <= traffic - (6 * (x + 3 * factor + 2 * total) + total) < 1024


class Lowered:
    """A lowered program that XLA does not compile with its own kernels for products."""

    def __init__(self, message):
        self.message = message

    def compile(self, compiler_options=None):
        if compiler_options != {"xla_gpu_enable_triton_gemm": False}:
            raise jax.errors.JaxRuntimeError(self.message)
        return "compiled"


def test_products_without_a_kernel_of_xla_are_those_of_cublas():
    assert programs._compiled(Lowered("INTERNAL: Couldn't find output tile sizes")) == "compiled"
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of luck"):
        programs._compiled(Lowered("INTERNAL: out of luck"))


def test_the_plugin_that_is_missing_is_named(monkeypatch):
    def missing(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(programs.topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=r'is not installed: pip install "jax\[cuda13-local\]"$'):
        devices_of(EIGHT)


@pytest.mark.slow
def test_a_program_of_cudnn_needs_cudnn(plugin):
    with contextlib.suppress(RuntimeError):
        pytest.skip(f"cuDNN {importlib.import_module('jax_cuda13_plugin._versions').cudnn_get_version()} is installed")
    update = program_of("update", dataclasses.replace(DECODER, dtype="bfloat16", attention="cudnn"))
    with pytest.raises(UserError, match=r'update on h100:8: attention is cudnn.* pip install "jax\[cuda13\]"$'):
        compile_program(config_of(update, topology=EIGHT), update)
