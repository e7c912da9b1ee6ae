"""Buffers that training changes, as BatchNorm does: unchanged by a skipped step, equal on all processes."""

from __future__ import annotations

from typing import cast

import torch
from accelerate.utils import broadcast
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns by name the buffers that a checkpoint holds: the persistent ones."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


class StepBuffers:
    """The saved buffers of a model through a step.

    Args:
        model: On its device.
    """

    def __init__(self, model: nn.Module):
        self.buffers = list(saved_buffers(model).values())
        self.before: list[Tensor] = []

    @torch.no_grad()
    def keep(self) -> None:
        """Keeps their values, at the beginning of a step."""
        self.before = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Gives them the values that were kept, where the step is skipped."""
        for buffer, value in zip(self.buffers, self.before, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def share(self) -> None:
        """Gives them the main process's values on all processes, as DDP does at the next forward pass."""
        for dtype in dict.fromkeys(buffer.dtype for buffer in self.buffers):
            same = [buffer for buffer in self.buffers if buffer.dtype == dtype]
            joined = cast(Tensor, broadcast(torch.cat([buffer.flatten() for buffer in same])))
            for buffer, value in zip(same, joined.split([b.numel() for b in same]), strict=True):
                buffer.copy_(value.view_as(buffer))


def join_batch_norms(model: nn.Module, device: torch.device, processes: int) -> str:
    """Makes the BatchNorms of a model normalise over the images of all processes, where the device has that.

    Args:
        model: Changed in place; names of its weights stay.
        device: Where it trains.
        processes: That train it.

    Returns:
        What was done, in words; empty for one process, or without a BatchNorm.
    """
    if processes == 1 or not any(isinstance(part, _BatchNorm) for part in model.modules()):
        return ""
    if device.type != "cuda":
        return (
            f"BatchNorm: each of the {processes} processes normalises by its own images, since SyncBatchNorm "
            f"requires GPUs, got {device.type}; the running statistics are those of the first"
        )
    convert_sync_batchnorm(model)
    return f"BatchNorm: the {processes} processes normalise by the images of all (SyncBatchNorm)"
