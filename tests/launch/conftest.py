"""The smallest networks, and what needs libtpu."""

import importlib.util

import pytest

from alignment_gap.launch.flops import Lengths
from alignment_gap.models import DecoderConfig

TINY = DecoderConfig(vocabulary_size=256, width=64, layers=2, heads=4, head_size=16, mlp_width=128, dtype="bfloat16")
LENGTHS = Lengths(batch=8, prompt=16, samples=2, response=8)


@pytest.fixture
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed")
