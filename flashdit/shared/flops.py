"""FLOPs of what a module computes, counted without its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

Counted = TypeVar("Counted", bound=nn.Module)


def copy_without_memory(module: Counted) -> Counted:
    """Returns a copy on torch's meta device, in evaluation mode; no weight is copied on the way."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for p in module.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in module.buffers()}
    return copy.deepcopy(module, memo).eval()


def count_flops(module: Counted, forward: Callable[[Counted], Any]) -> int:
    """Returns the FLOPs of matrix products and convolutions, two for a multiply-add.

    Args:
        module: Unchanged.
        forward: Computes with a copy of it; tensors that it makes are on the meta device.
    """
    blank = copy_without_memory(module)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(blank)
    return counter.get_total_flops()
