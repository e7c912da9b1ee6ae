"""Whether float32 products on a GPU may round their factors to TF32: one switch, and a place without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_tf32(allowed: bool) -> None:
    """Lets matrix products and convolutions of float32 round to TF32, in the whole process, or forbids it."""
    # The older switches of CUDA alone and this one contradict each other where both are used.
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def full_float32() -> Iterator[None]:
    """Runs without TF32 and with one kernel per shape, whatever the process allows elsewhere."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
