"""Memory that XLA frees on the CPU is kept for its next call, and only there."""

import subprocess
import sys

import pytest

from alignment_gap import freed_memory

# Page faults of twenty calls, each with a temporary array of 64 MiB.
FAULTS = """
import resource
from alignment_gap import freed_memory
{keep}
import jax, jax.numpy as jnp
run = jax.jit(lambda x: jnp.sort(jnp.sin(jnp.broadcast_to(x, (1 << 24,))))[::1 << 20])
run(1.0).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    run(1.0).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep, platforms="cpu"):
    environment = {"JAX_PLATFORMS": platforms, "PATH": "", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_later_calls_take_no_memory_from_the_system():
    assert faults("freed_memory.keep_on_cpu()") < 0.01 * faults("")


def test_nothing_is_changed_where_there_may_be_accelerators(monkeypatch):
    asked = []
    monkeypatch.setattr(freed_memory.ctypes, "CDLL", asked.append)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(freed_memory.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    freed_memory.keep_on_cpu()
    assert asked == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    freed_memory.keep_on_cpu()
    assert asked == [None]
