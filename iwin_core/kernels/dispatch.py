"""Whether the fused kernels run: one option for the process, what the device can, what the kernels take."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

BACKENDS = ("auto", "eager", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WINDOW, MAX_HEAD_DIM, MAX_KERNEL = 16, 128, 7
MAX_VALUES = 2**31  # of one sample: offsets inside it are 32-bit
PASSED_ON_GPU = False
"""Whether `make gpu` has passed on a GPU: until then `auto` means eager code there too."""


def checked(name: str) -> str:
    """Returns the name of a backend, or raises ValueError."""
    if name not in BACKENDS:
        raise ValueError(f"kernel backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = checked(os.environ.get("IWIN_KERNELS", "auto"))


def set_backend(name: str) -> str:
    """Chooses between fused kernels and eager code for the whole process; returns the choice before.

    Args:
        name: `auto` (kernels on CUDA devices, for what they take, once they have passed on one), `eager`
            (never) or `triton` (always: what they do not take is refused). The environment variable
            IWIN_KERNELS sets the first choice.

    Raises:
        ValueError: If there is no such backend.
    """
    global _backend
    before, _backend = _backend, checked(name)
    return before


def kernels_wait() -> bool:
    """Returns whether `auto` leaves the kernels off only because none has passed on a GPU."""
    return _backend == "auto" and not PASSED_ON_GPU


def device_runs_kernels(kind: str, index: int | None) -> bool:
    """Returns whether Triton is installed and can run on the device: bf16 needs capability 8.0."""
    if importlib.util.find_spec("triton") is None:
        return False
    if kind == "cuda":
        return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)
    return kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


# What torch.compiler.assume_constant_result does, without importing torch._dynamo, sympy and triton with it.
device_runs_kernels._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def kernels_chosen(device: torch.device, obstacle: Callable[..., str | None], *arguments: Any) -> bool:
    """Returns whether the kernels run rather than eager code.

    Args:
        device: Where the tensors are.
        obstacle: Returns what the kernels do not take, as a rule and a value, or None.
        arguments: For `obstacle`, which is asked only where the device stands for the kernels: tracing for an
            export elsewhere then meets no condition on sizes.

    Raises:
        ValueError: If `triton` was demanded and does not run here.
    """
    if _backend == "eager":
        return False
    if _backend == "auto":
        runs = PASSED_ON_GPU and device.type == "cuda" and device_runs_kernels("cuda", device.index)
        return runs and obstacle(*arguments) is None
    if not device_runs_kernels(device.type, device.index):
        rule = "a CUDA device of capability 8.0 and Triton, or TRITON_INTERPRET=1 on the CPU"
        raise ValueError(f"kernel backend 'triton' needs {rule}, got device={device.type}")
    if (found := obstacle(*arguments)) is not None:
        raise ValueError(f"kernel backend 'triton' takes {found}")
    return True


def attention_obstacle(
    shape: Sequence[int],
    dtype: torch.dtype,
    num_heads: int,
    window: Sequence[int],
    norms: Sequence[nn.Module],
    biased: bool,
    rotary: bool = False,
    registers: int = 0,
) -> str | None:
    """Returns what in an attention the kernels do not take, if anything.

    Args:
        shape: Of the map (B, *grid, C).
        dtype: Of the map.
        num_heads: Attention heads.
        window: Sides of the window.
        norms: Of queries and of keys.
        biased: Whether anything is added to the logits.
        rotary: Whether queries and keys are turned by position.
        registers: That each window reads and writes.
    """
    head_dim = shape[-1] // num_heads
    if len(shape) != 4:
        return f"maps of rank 2, got rank={len(shape) - 2}"
    if dtype not in KERNEL_DTYPES:
        return f"float32, bfloat16 and float16, got {dtype=}"
    if max(window) > MAX_WINDOW:
        return f"windows up to {MAX_WINDOW}, got window={tuple(window)}"
    if head_dim > MAX_HEAD_DIM:
        return f"heads up to {MAX_HEAD_DIM} channels wide, got {head_dim=}"
    if 3 * shape[1] * shape[2] * shape[3] >= MAX_VALUES:
        return f"maps below 2**31 values of q, k and v a sample, got shape={tuple(shape)}"
    if biased:
        return "attention without a relative position bias, got one"
    if rotary:
        return "attention without rotary positions, got rope=True"
    if registers:
        return f"attention without registers, got {registers=}"
    if not (all(isinstance(norm, nn.Identity) for norm in norms) or are_rms_norms(*norms)):
        return f"RMSNorm with a weight and one eps or no norm, got {norms[0]!r} and {norms[1]!r}"
    return None


def are_rms_norms(q_norm: nn.Module, k_norm: nn.Module) -> bool:
    """Returns whether the kernels can apply the norms of queries and keys."""
    if not (isinstance(q_norm, nn.RMSNorm) and isinstance(k_norm, nn.RMSNorm)):
        return False
    weighted = q_norm.weight is not None and k_norm.weight is not None
    return weighted and q_norm.eps is not None and q_norm.eps == k_norm.eps


def conv_obstacle(shape: Sequence[int], dtype: torch.dtype, kernel: Sequence[int]) -> str | None:
    """Returns what in a depthwise convolution of a map (B, *grid, C) the kernels do not take, if anything."""
    if len(shape) != 4:
        return f"maps of rank 2, got rank={len(shape) - 2}"
    if dtype not in KERNEL_DTYPES:
        return f"float32, bfloat16 and float16, got {dtype=}"
    if max(kernel) > MAX_KERNEL:
        return f"depthwise kernels up to {MAX_KERNEL}, got kernel={tuple(kernel)}"
    if shape[1] * shape[2] * shape[3] >= MAX_VALUES:
        return f"maps below 2**31 values a sample, got shape={tuple(shape)}"
    return None
