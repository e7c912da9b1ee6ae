"""Freed memory kept for the next tensor, on the CPU: fresh pages cost a step up to a quarter of its time."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30
"""Tensors below this size are taken from the heap, and as much may lie free at its end."""


def keep_freed_memory() -> bool:
    """Makes the process keep memory that it frees, instead of giving each large tensor's pages back.

    glibc maps what is larger than 32 MiB anew each time, and the kernel zeroes it page by page. The process
    then holds the peak of its use until it ends. Once called, it holds for the whole process.

    Returns:
        Whether the C library took it: only glibc does.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(name, KEPT_BYTES) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
