"""Switches of the whole process: memory that the C library keeps, and how exact float32 products are."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from iwin_core.kernels.cpu_attention import BF16_INSTRUCTIONS, FUSED, read_table, this_processor

AnyModule = TypeVar("AnyModule", bound=nn.Module)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 2**30
"""Tensors below this size are taken from the heap, and as much may lie free at its end."""
AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by name, and the dtype that autocast gives matrix products in each; None leaves float32."""
AUTO = "auto"
"""A value that is decided by the device where it is first used, and written down."""


def precision_here(device: str) -> str:
    """Returns what `auto` means on a device: bf16 where it has matrix products for it, else fp32.

    Args:
        device: Its name.
    """
    if torch.device(device).type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if this_processor().endswith(BF16_INSTRUCTIONS) else "fp32"


def decided(precision: str, device: torch.device | str) -> str:
    """Returns a precision, in the place of `auto` what that means on the device."""
    return precision_here(str(device)) if precision == AUTO else precision


def attention_here(device: str) -> str:
    """Returns whose measurements decide how attention is computed on a CPU: `fused` where there are none.

    Args:
        device: Its name; a GPU leaves it open, as `auto`.
    """
    if torch.device(device).type != "cpu":
        return AUTO
    return this_processor() if this_processor() in read_table() else FUSED


def check_processes(num_processes: int) -> None:
    """Refuses processes that a launcher started together and that do not know of each other.

    Args:
        num_processes: How many this process knows of.

    Raises:
        ValueError: If the launcher's WORLD_SIZE is larger: each would do the whole work.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > num_processes:
        raise ValueError(
            f"the launcher's {started} processes (WORLD_SIZE) must work together, this one knows of "
            f"{num_processes}: start it without a launcher, or check its configuration"
        )


def device_memory(device: torch.device) -> int | None:
    """Returns the bytes of a device's memory; None where the system does not tell.

    Processes that a launcher started on one machine share that of its CPU.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on Windows
        return None
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def check_memory(needed: float, device: torch.device, what: str) -> None:
    """Raises ValueError if a device's memory cannot hold so many bytes.

    Args:
        needed: Bytes.
        device: That is to hold them.
        what: Takes them, for the message.
    """
    memory = device_memory(device)
    if memory is not None and needed > memory:
        given, wanted = (f"{size / 2**30:,.4g} GiB" for size in (memory, needed))
        raise ValueError(f"{what} must fit into the memory of {device}, {given}, got {wanted}")


def without_memory(make: Callable[[], AnyModule]) -> AnyModule:
    """Returns the model that a function makes, on torch's meta device.

    Raises:
        ValueError: If a tensor of it is larger than any machine could address.
    """
    try:
        with torch.device("meta"):
            return make()
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"a model's tensors must be of sizes that a machine can address: {error}") from error


def check_model_fits(make: Callable[[], nn.Module], batch: Sequence[int], device: torch.device) -> None:
    """Refuses a model or a batch that a device's memory cannot hold in training, before they are made.

    Args:
        make: Returns the model.
        batch: Shape of a process's images at a time, (B, C, H, W), in float32.
        device: That it will be trained on.

    Raises:
        ValueError: If its weights, average, gradients and AdamW's two moments, 20 bytes a parameter, and the
            images do not fit, or a tensor is larger than any machine could address.
    """
    count = sum(parameter.numel() for parameter in without_memory(make).parameters())
    what = f"training {count:,} parameters on {batch[0]:,} images at once"
    check_memory(20.0 * count + 4.0 * math.prod(batch), device, what)


def keep_freed_memory() -> bool:
    """Makes the process keep memory that it frees, instead of giving each large tensor's pages back.

    glibc maps what is larger than 32 MiB anew each time, and the kernel zeroes it page by page. The process
    then holds the peak of its use until it ends. A step takes up to a quarter less time on a CPU. Once
    called, it holds for the whole process: commands that compute on the CPU call it, nothing else does.

    Returns:
        Whether the C library took it: only glibc does.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(name, KEPT_BYTES) == 1 for name in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Runs with matrix products and convolutions of float32 that may round to TF32, or may not.

    The process has its own switches back afterwards.
    """
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    # The older switches of CUDA alone and this one contradict each other where both are used.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def computing_in(precision: str, device: torch.device) -> Iterator[None]:
    """Runs matrix products and convolutions in a precision.

    Args:
        precision: One of `AUTOCAST`. `fp32` forbids TF32, `tf32` allows it; on a CPU they are the same.
        device: Where the model runs.
    """
    dtype = AUTOCAST[precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    with float32_products(tf32=precision == "tf32"), autocast:
        yield


@contextmanager
def full_float32() -> Iterator[None]:
    """Runs without TF32 and with one kernel per shape, whatever the process allows elsewhere."""
    one_kernel = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with float32_products(tf32=False), one_kernel:
        yield
