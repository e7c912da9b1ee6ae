"""The whole state of a model and its optimiser, gathered from and spread over whatever holds it in shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns every tensor of the model on the CPU; all processes call it, the first gets the content."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=WHOLE))


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a state that every process holds whole."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the optimiser's state by parameter name; all processes call it, the first gets the content."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads moments and counts; learning rate, weight decay and the like stay as they are configured."""
    configured = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor on the CPU; all processes call it where it lies in shards."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor, which every process holds, into one that may lie in shards."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
