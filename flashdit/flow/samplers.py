"""ODE samplers as functions of a velocity: they integrate dx/dt = v(x, t) from t = 0 (noise) to 1 (data)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flashdit.flow.guidance import Velocity
from flashdit.registry import unknown

Sampler = Callable[[Velocity, Tensor, Sequence[float]], Tensor]


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """Returns steps + 1 times from 0 to 1.

    With lin evenly spaced, t = shift · lin / (1 + (shift − 1) · lin): below 1 the steps are finer near noise.

    Args:
        steps: Updates; LightningDiT's `num_steps` counts points, one more.
        shift: Positive; 1 leaves the times evenly spaced.

    Raises:
        ValueError: If steps or shift cannot be.

    Source: LightningDiT's transport (timestep_shift), Esser et al. 2024 eq. (23).
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    lin = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (shift * lin / (1 + (shift - 1) * lin)).tolist()


def euler(v: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Returns x at the last time by Euler's method: first order, one evaluation an update.

    Args:
        v: (x_t, t) → velocity of the shape of x_t.
        x: State at the first time, (B, …); the integration runs in its dtype.
        times: Increasing times, as `time_grid` gives them.
    """
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * v(x, t).to(x.dtype)
    return x


def heun(v: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Returns x at the last time by Heun's method: second order, two evaluations an update.

    Args:
        v: (x_t, t) → velocity of the shape of x_t.
        x: State at the first time, (B, …); the integration runs in its dtype.
        times: Increasing times, as `time_grid` gives them.
    """
    for t, t_next in pairwise(times):
        step = t_next - t
        slope = v(x, t).to(x.dtype)
        slope_next = v(x + step * slope, t_next).to(x.dtype)
        x = x + step * (slope + slope_next) / 2
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun}


def get_sampler(name: str) -> Sampler:
    """Returns the sampler of this name, or raises ValueError with the known ones."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]
