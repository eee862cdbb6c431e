"""Settings for how the C library's allocator treats freed memory."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Parameters of mallopt(3), and the largest value of a parameter.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST = 2**31 - 1


def keep_on_cpu() -> None:
    """Makes glibc keep freed memory for the next allocation, if jax can find no devices except CPUs.

    On CPUs, XLA allocates a function's temporary arrays at each call. By default glibc gets large arrays from the
    system, which clears every page, and returns them after the call. benchmarks/freed_memory.py measures the gain.

    Call it before the first thread starts, and so before numpy is imported: a thread may have its own heap, and memory
    kept there is not available to other threads.
    """
    if sys.platform != "linux" or (os.environ.get("JAX_PLATFORMS") != "cpu" and _may_have_accelerators()):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # C libraries other than glibc may not have it.
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _MOST)
        mallopt(_M_TRIM_THRESHOLD, _MOST)


def _may_have_accelerators() -> bool:
    """Whether jax could find accelerators; asking jax itself would start threads."""
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
