"""The exponential moving average of the weights, float32, with its counter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(kw_only=True)
class EmaOptions:
    """Options of the average."""

    decay: float = 0.9999
    """Share of the old average that an update keeps."""
    warmup: bool = True
    """Whether early updates keep only (1 + n) / (10 + n), so that the initial weights are soon forgotten."""


class Ema:
    """The averaged parameters by name, float32; the model's own are never touched.

    Args:
        model: Whose parameters are averaged; the average starts as their copy.
        options: Decay and warm-up.

    Attributes:
        updates: How many updates it has seen.
    """

    def __init__(self, model: nn.Module, options: EmaOptions):
        if not 0 <= options.decay < 1:
            raise ValueError(f"ema.decay must be at least 0 and below 1, got {options.decay}")
        self.options = options
        self.updates = 0
        self.average = {name: p.detach().float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's parameters."""
        self.updates += 1
        decay = self.options.decay
        if self.options.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().float() for _, p in model.named_parameters()]
        for average, value in zip(self.average.values(), current, strict=True):
            average.lerp_(value, 1 - decay)

    @torch.no_grad()
    def load(self, average: Mapping[str, Tensor], updates: int) -> None:
        """Continues from a saved average and its counter."""
        for name, value in self.average.items():
            value.copy_(average[name])
        self.updates = updates

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into a model, another one than is trained."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.average[name])
