"""What the allocator of the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Parameters of mallopt(3), and the largest value that one takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST = 2**31 - 1


def keep_on_cpu() -> None:
    """Has glibc keep memory that is freed, for the next allocation, where jax can find no devices but CPUs.

    On them XLA allocates the temporary arrays of a function at each call. By default glibc gets large ones from the
    system, which clears every page, and gives them back after the call. benchmarks/freed_memory.py measures the gain.

    It has to be called before the first thread is started, so before numpy is imported: a thread has a heap of its own,
    and memory that is kept in it serves no other.
    """
    if sys.platform != "linux" or (os.environ.get("JAX_PLATFORMS") != "cpu" and _may_have_accelerators()):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # Another C library than glibc may have none.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MOST)
        mallopt(_M_TRIM_THRESHOLD, _MOST)


def _may_have_accelerators() -> bool:
    """Whether jax could find accelerators; asking jax itself would start threads."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
