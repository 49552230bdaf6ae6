"""Memory that this process keeps for itself.

The C library gives every large block back to the kernel when it is freed, and asks for it again, page by page and zeroed, at the next
step. On a CPU that costs a training step more than its optimiser does (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc
LARGEST_KEPT, OLD_LARGEST, NEVER = 2**30, 2**25, 2**31 - 1
"""Older releases of glibc take no threshold above 32 MiB."""
CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """From now on freed blocks of up to 1 GiB stay with the process; its peak grows by what lies unused between them.

    Whoever has chosen an allocator or its thresholds by environment variable keeps that choice.

    Returns:
        Whether it was done: only glibc can.
    """
    if any(os.environ.get(name) for name in CHOSEN_BY_USER):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in (LARGEST_KEPT, OLD_LARGEST))
    return kept and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
