"""AdamW and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from flashdit.shared.registry import check_finite


@dataclass(kw_only=True)
class OptimizerOptions:
    """Options of AdamW and its schedule; the defaults are LightningDiT's recipe.

    Raises:
        ValueError: If the learning rate or the clipping norm is not positive, a decay is not a share, or a
            number is negative or not finite.
    """

    lr: float = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    decay_steps: int | None = None
    """Step at which a cosine from the peak ends at `min_lr`; None keeps the peak. It is not
    `training.steps`, so that a run which is lengthened keeps the past it had."""
    min_lr: float = 0.0
    """Learning rate at `decay_steps` and after it."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; None leaves them."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "optimizer.")
        for name in ("lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"optimizer.{name} must be positive, got {value}")
        for name in ("weight_decay", "min_lr", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be at least 0 and below 1, got {list(self.betas)}")


def learning_rate(step: int, options: OptimizerOptions) -> float:
    """Returns the learning rate of the update that makes step `step` (the first is 1)."""
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    if options.decay_steps is None:
        return options.lr
    progress = (step - options.warmup_steps) / max(1, options.decay_steps - options.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return options.min_lr + (options.lr - options.min_lr) * cosine


def unfinished_decay(steps: int, options: OptimizerOptions) -> str:
    """Returns in words what is left of the learning rate at the last step, where it is still to fall."""
    if options.decay_steps is None or options.decay_steps <= steps:
        return ""
    left = learning_rate(steps, options) / options.lr
    return (
        f"the learning rate ends at {left:.0%} of its peak: training.steps is {steps:,}, "
        f"optimizer.decay_steps {options.decay_steps:,}"
    )


def make_optimizer(parameters: Iterable[Any], options: OptimizerOptions) -> torch.optim.AdamW:
    """Returns fused AdamW over the parameters that train.

    Args:
        parameters: Parameters, or groups of them as torch's optimisers take them.
        options: Of AdamW.
    """
    trained = [item for item in parameters if isinstance(item, dict) or item.requires_grad]
    betas = (options.betas[0], options.betas[1])
    return torch.optim.AdamW(
        trained, lr=options.lr, betas=betas, weight_decay=options.weight_decay, fused=True
    )
