"""Real programs, compiled in processes of their own."""

import dataclasses
import importlib.util

import pytest

from alignment_gap.errors import UserError
from alignment_gap.models import DecoderConfig, count_parameters, make_policy
from alignment_gap.plan.chips import GIB, parse_topology
from alignment_gap.plan.flops import Lengths
from alignment_gap.plan.programs import Request, compile_program, environment, exceeded_bytes
from alignment_gap.sharding import MeshConfig

TINY = DecoderConfig(vocabulary_size=256, width=64, layers=2, heads=4, head_size=16, mlp_width=128, dtype="bfloat16")
LENGTHS = Lengths(batch=8, prompt=16, samples=2, response=8)
CPU = Request("update", TINY, parse_topology("cpu:8"), MeshConfig(layout="fsdp"), LENGTHS)


@pytest.fixture
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed")


@pytest.fixture(scope="module")
def on_cpu():
    return compile_program(CPU)


def test_the_update_step_on_virtual_devices(on_cpu):
    # All parameters' widths are divided by the eight devices: a part of float32 each, and two moments and two counts.
    part = 4 * count_parameters(make_policy(TINY)) // 8
    assert on_cpu.parameters == part
    assert 3 * part <= on_cpu.state <= 3 * part + 16
    assert on_cpu.aliased == on_cpu.state
    assert on_cpu.temporaries > 0
    assert {each.axes for each in on_cpu.collectives} == {"fsdp"}
    assert not on_cpu.exceeded


def test_equal_requests_are_compiled_once(on_cpu):
    assert compile_program(dataclasses.replace(CPU)) is on_cpu


def test_a_tpu_without_a_tpu(libtpu):
    compiled = compile_program(dataclasses.replace(CPU, topology=parse_topology("v5e:2x4")))
    assert compiled.parameters == 4 * count_parameters(make_policy(TINY)) // 8
    assert compiled.code > 0
    assert compiled.traffic > compiled.state
    assert "fsdp" in {each.axes for each in compiled.collectives}


def test_what_a_tpu_has_no_room_for(libtpu):
    lengths = dataclasses.replace(LENGTHS, batch=2**20, prompt=1024)
    compiled = compile_program(
        dataclasses.replace(CPU, program="reference", topology=parse_topology("v5e:2x4"), lengths=lengths)
    )
    assert compiled.exceeded > 15.75 * GIB
    assert compiled.peak == compiled.exceeded


def test_cuda_that_is_not_here_is_one_line():
    with pytest.raises(UserError, match=r"cuda:64: .*cuda devices?") as caught:
        compile_program(dataclasses.replace(CPU, topology=parse_topology("cuda:64")))
    assert "\n" not in str(caught.value)


def test_tpu_processes_may_run_side_by_side_and_reach_for_no_tpu():
    variables = environment(parse_topology("v5p:4x4x4"))
    assert variables["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert variables["JAX_PLATFORMS"] == "cpu"
    assert "device_count=8" in environment(parse_topology("cpu:8"))["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("the total memory required for HLO temporaries (120.50G) exceeds available HBM (15.75G).", 121.5),
        ("memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.7G. Total hbm usage >= 21.00G:", 21),
        ("memory space hbm. Used 512.0M of 15.75G hbm.", 0.5),
    ],
)
def test_the_compilers_words_where_memory_ran_out(message, gib):
    assert exceeded_bytes(f"RESOURCE_EXHAUSTED: Ran out of {message}", int(GIB)) == int(gib * GIB)


def test_no_figure_no_guess():
    with pytest.raises(UserError, match="without a figure: RESOURCE_EXHAUSTED: no idea"):
        exceeded_bytes("RESOURCE_EXHAUSTED: no idea\nmore", 0)
