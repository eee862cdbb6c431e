"""Virtual devices as a mesh, and the TPU compiler where it is installed."""

import importlib.util
import pathlib
import sys

import pytest

# Makes planning importable from this folder, however pytest was started.
sys.path.insert(0, str(pathlib.Path(__file__).parent))

from planning import config_of, program_of

from alignment_gap.plan.programs import compile_here


@pytest.fixture
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed")


@pytest.fixture(scope="session")
def compiled():
    """`compiled(kind, layout)`: a program of the decoder, compiled once for the virtual devices of this process."""
    found = {}

    def compile_once(kind, layout="fsdp"):
        if (kind, layout) not in found:
            program = program_of(kind)
            found[kind, layout] = compile_here(config_of(program, layout=layout), program)
        return found[kind, layout]

    return compile_once
