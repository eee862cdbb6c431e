"""On a CPU, and only there, freed memory of XLA stays in the process for the next call."""

import ctypes
import subprocess
import sys

import pytest

from alignment_gap import freed_memory

# Free bytes that the allocator keeps after a call with a temporary array of 64 MiB.
HELD = """
import ctypes
from alignment_gap import freed_memory
{keep}
import jax, jax.numpy as jnp
jax.jit(lambda x: jnp.sort(jnp.sin(x + jnp.arange(1 << 24, dtype=jnp.float32)))[::1 << 20])(1.0).block_until_ready()
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Statistics = type("Statistics", (ctypes.Structure,), {{"_fields_": [(name, ctypes.c_size_t) for name in names]}})
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Statistics
print(mallinfo2().fordblks)
"""


def held(keep):
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", HELD.format(keep=keep)], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the allocator is not that of glibc 2.33")
def test_a_freed_array_waits_for_the_next_call():
    assert held("") < 64 * 2**20 <= held("freed_memory.keep_on_cpu()")


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
