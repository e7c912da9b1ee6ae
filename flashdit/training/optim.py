"""AdamW, Muon beside it, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flashdit.shared.registry import check_finite, unknown

ADAMW, MUON = "adamw", "muon"
OPTIMIZERS = (ADAMW, MUON)
COSINE, STEP, POLY = "cosine", "step", "poly"
SCHEDULES = (COSINE, STEP, POLY)


@dataclass(kw_only=True)
class MuonOptions:
    """Options of Muon, for `optimizer.name=muon`.

    Raises:
        ValueError: If the scale is not positive, the momentum is not a share, or there is no iteration.
    """

    lr_scale: float = 1.0
    """Muon's learning rate as a multiple of AdamW's; an update's root mean square is 0.2 of it, as AdamW's
    typically is."""
    momentum: float = 0.95
    """Decay of the average of the gradient; Nesterov's step is taken from it."""
    iterations: int = 5
    """Newton–Schulz iterations, which make the singular values of an update nearly equal."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "optimizer.muon.")
        if self.lr_scale <= 0:
            raise ValueError(f"optimizer.muon.lr_scale must be positive, got {self.lr_scale}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.muon.momentum must be at least 0 and below 1, got {self.momentum}")
        if not 1 <= self.iterations < 100:
            raise ValueError(f"optimizer.muon.iterations must be 1 to 99, got {self.iterations}")


@dataclass(kw_only=True)
class OptimizerOptions:
    """Options of the optimiser and its schedule; the defaults are LightningDiT's recipe.

    Raises:
        ValueError: If a name is unknown, torch has no Muon, the learning rate or the clipping norm is not
            positive, a decay is not a share, a number is negative or not finite, or the schedule lacks an
            option or has another's.
    """

    name: str = ADAMW
    """`adamw`, or `muon` for the weights of linear layers in blocks and AdamW for all others."""
    lr: float = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: float = 0.0
    """Decoupled, times the learning rate."""
    no_decay: list[str] | None = None
    """A parameter with one of these texts in its name does not decay, such as [norm, bias]; None is the
    task's rule: of a classifier matrices and kernels decay, of other tasks all does."""
    warmup_steps: int = 0
    """Optimiser steps of linear warm-up."""
    warmup_start: float = 0.0
    """Share of the learning rate from which the warm-up rises."""
    schedule: str = COSINE
    """How the learning rate falls: `cosine` from the end of the warm-up to `decay_steps`, `step` after each
    of `milestones`, `poly` from the first step to `decay_steps`."""
    decay_steps: int | None = None
    """Step at which `cosine` and `poly` end at `min_lr`; None keeps the peak. It is not `training.steps`, so
    that a run which is lengthened keeps the past it had."""
    decay_power: float = 1.0
    """Of `poly`: power of the share of steps that is left; 1 is a line."""
    milestones: list[int] = field(default_factory=list)
    """Of `step`: steps after which the learning rate is multiplied by `milestone_factor`."""
    milestone_factor: float = 0.1
    """Of `step`: what each of `milestones` multiplies by."""
    min_lr: float = 0.0
    """Learning rate at `decay_steps` and after it; `step` falls no lower."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; None leaves them."""
    muon: MuonOptions = field(default_factory=MuonOptions)

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "optimizer.")
        if self.name not in OPTIMIZERS:
            raise unknown("optimizer.name", self.name, OPTIMIZERS)
        if self.name == MUON and not hasattr(torch.optim, "Muon"):
            rule = "optimizer.name=muon requires PyTorch 2.9 or newer, which has torch.optim.Muon"
            raise ValueError(f"{rule}, got {torch.__version__}")
        for name in ("lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"optimizer.{name} must be positive, got {value}")
        for name in ("weight_decay", "min_lr", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")
        if self.no_decay is not None and not all(self.no_decay):
            raise ValueError(f"optimizer.no_decay must be texts that are not empty, got {self.no_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be at least 0 and below 1, got {list(self.betas)}")
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Checks that the schedule has what it needs, and nothing of another one."""
        if self.schedule not in SCHEDULES:
            raise unknown("optimizer.schedule", self.schedule, SCHEDULES)
        if not 0 <= self.warmup_start <= 1:
            raise ValueError(f"optimizer.warmup_start must be from 0 to 1, got {self.warmup_start}")
        if not 0 < self.milestone_factor < 1:
            rule = "optimizer.milestone_factor must be above 0 and below 1"
            raise ValueError(f"{rule}, got {self.milestone_factor}")
        if self.decay_power <= 0:
            raise ValueError(f"optimizer.decay_power must be positive, got {self.decay_power}")
        if self.milestones != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            rule = "optimizer.milestones must be steps from 1, each later than the one before"
            raise ValueError(f"{rule}, got {self.milestones}")
        if bool(self.milestones) != (self.schedule == STEP):
            rule = "optimizer.milestones must be given with optimizer.schedule=step, and with it alone"
            raise ValueError(f"{rule}, got {self.milestones} with {self.schedule}")
        if self.schedule == STEP and self.decay_steps is not None:
            rule = "optimizer.decay_steps must be null with optimizer.schedule=step, which has milestones"
            raise ValueError(f"{rule}, got {self.decay_steps}")
        if self.schedule == POLY and self.decay_steps is None:
            rule = "optimizer.schedule=poly requires optimizer.decay_steps of at least 1"
            raise ValueError(f"{rule}, got {self.decay_steps}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"optimizer.decay_steps must be at least 1, got {self.decay_steps}")


def learning_rate(step: int, options: OptimizerOptions) -> float:
    """Returns the learning rate of the update that makes step `step` (the first is 1).

    Source: `step`, `poly` and a warm-up that multiplies them are mmdetection's and mmsegmentation's. These
        count from 0, so that poly and warm-up have here at an update what they have there at the next one.
    """
    rate = scheduled_rate(step, options)
    if step > options.warmup_steps:
        return rate
    start = options.warmup_start * rate
    return start + (rate - start) * step / options.warmup_steps


def scheduled_rate(step: int, options: OptimizerOptions) -> float:
    """Returns the learning rate at a step, before the warm-up takes its share."""
    peak, least = options.lr, options.min_lr
    if options.schedule == STEP:
        passed = bisect_left(options.milestones, step)  # a milestone itself is of the rate before it
        return max(least, peak * options.milestone_factor**passed)
    if options.decay_steps is None:
        return peak
    if options.schedule == POLY:
        left = 1 - min(step, options.decay_steps) / options.decay_steps
        return least + (peak - least) * left**options.decay_power
    if step <= options.warmup_steps:
        return peak
    progress = (step - options.warmup_steps) / max(1, options.decay_steps - options.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return least + (peak - least) * cosine


def unfinished_decay(steps: int, options: OptimizerOptions) -> str:
    """Returns in words what is left of the learning rate at the last step, where it is still to fall."""
    if options.milestones and options.milestones[-1] >= steps:
        to_come = f"optimizer.milestones {options.milestones}"
    elif options.decay_steps is not None and options.decay_steps > steps:
        to_come = f"optimizer.decay_steps {options.decay_steps:,}"
    else:
        return ""
    left = learning_rate(steps, options) / options.lr
    return f"the learning rate ends at {left:.0%} of its peak: training.steps is {steps:,}, {to_come}"


def linear_weights(blocks: Iterable[nn.Module]) -> list[Tensor]:
    """Returns the weights that Muon takes: those of the linear layers in blocks that train."""
    layers = (layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear))
    return [layer.weight for layer in layers if layer.weight.requires_grad]


def make_optimizer(
    parameters: Iterable[Any], options: OptimizerOptions, hidden: Collection[Tensor] = ()
) -> torch.optim.Optimizer:
    """Returns the optimiser of the parameters that train: fused AdamW, or Muon beside it.

    Args:
        parameters: Parameters, or groups of them as torch's optimisers take them.
        options: Of the optimiser.
        hidden: Which of them Muon takes, each a matrix; AdamW takes all others.

    Raises:
        ValueError: If there is nothing for Muon.
    """
    given = list(parameters)
    single = [item for item in given if not isinstance(item, dict) and item.requires_grad]
    groups = [*([{"params": single}] if single else []), *(item for item in given if isinstance(item, dict))]
    if options.name == ADAMW:
        return make_adamw(groups, options)
    if not hidden:
        raise ValueError("optimizer.name=muon requires linear layers in the model's blocks, got none")
    return MuonBesideAdamW(groups, options, hidden)


def make_adamw(groups: list[dict[str, Any]], options: OptimizerOptions) -> torch.optim.AdamW:
    """Returns fused AdamW over groups of parameters."""
    betas = (options.betas[0], options.betas[1])
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=betas, weight_decay=options.weight_decay, fused=True
    )


class MuonBesideAdamW(torch.optim.Optimizer):
    """Torch's Muon over matrices and AdamW over the rest, with one state and one list of groups.

    Both decay weights by lr · weight_decay. Of Muon's update all singular values are near
    0.2 · sqrt(max(rows, columns)) · lr.

    Args:
        groups: Of parameters, whose further options both take over.
        options: Of the optimiser.
        hidden: The matrices that Muon takes; the groups hold them.

    Source: Jordan et al. 2024, Muon; the length of an update: Liu et al. 2025 (arXiv 2502.16982), eq. (4).
    """

    def __init__(self, groups: list[dict[str, Any]], options: OptimizerOptions, hidden: Collection[Tensor]):
        ids = {id(parameter) for parameter in hidden}

        def chosen(is_hidden: bool) -> list[dict[str, Any]]:
            parts = [
                {**group, "params": [p for p in group["params"] if (id(p) in ids) == is_hidden]}
                for group in groups
            ]
            return [part for part in parts if part["params"]]

        muon = options.muon
        matrices = [
            {**group, "lr_scale": group.get("lr_scale", 1.0) * muon.lr_scale} for group in chosen(True)
        ]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=options.lr * muon.lr_scale,
                weight_decay=options.weight_decay,
                momentum=muon.momentum,
                ns_steps=muon.iterations,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if others := chosen(False):
            self.parts.append(make_adamw(others, options))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Makes both read and write the one state and the one list of groups."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over a state that was loaded, in both."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Makes one update of all parameters."""
        assert closure is None
        for part in self.parts:
            part.step()
