"""Samplers that start each update anew: Euler, Heun, Dormand-Prince and Euler-Maruyama."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from flashdit.flow.guidance import Velocity
from flashdit.flow.path import score
from flashdit.flow.samplers import SAMPLERS, Draw
from flashdit.shared.registry import check_finite


@SAMPLERS.register("euler")
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


@SAMPLERS.register("heun")
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


@dataclass(kw_only=True)
class Dopri5Options:
    """Options of `dopri5`."""

    atol: float = 1e-5
    """Absolute tolerance of a step."""
    rtol: float = 1e-5
    """Relative tolerance of a step."""

    def __post_init__(self):
        check_finite(self, "dopri5's ")
        if not (self.atol > 0 and self.rtol > 0):
            raise ValueError(f"atol and rtol must be positive, got {self.atol} and {self.rtol}")


@SAMPLERS.register("dopri5", Dopri5Options, adaptive=True)
def dopri5(
    v: Velocity, x: Tensor, times: Sequence[float], *, options: Dopri5Options, jumps: Sequence[float] = ()
) -> Tensor:
    """Returns x at the last time by Dormand and Prince's adaptive method of order 5.

    One step size serves the whole of x: for an image that depends on no other, give one image at a time.

    Args:
        v: (x_t, t) → velocity of the shape of x_t.
        x: State at the first time, (B, …); the integration runs in float32 at least.
        times: Increasing times, of which the first and the last alone matter.
        options: The tolerances.
        jumps: Times where v jumps, such as the ends of the guidance interval.

    Source: torchdiffeq; Dormand & Prince 1980.
    """
    start, end = times[0], times[-1]
    state = x.to(torch.promote_types(x.dtype, torch.float32))
    inside = [t for t in sorted(set(jumps)) if start < t < end]
    grid = {"step_t": state.new_tensor([end], dtype=torch.float64)}  # no evaluation beyond the end
    if inside:
        grid["jump_t"] = state.new_tensor(inside, dtype=torch.float64)
    span = state.new_tensor([start, end], dtype=torch.float64)

    def slope(t: Tensor, x_t: Tensor) -> Tensor:
        return v(x_t, float(t)).to(x_t.dtype)

    try:
        path = odeint(slope, state, span, method="dopri5", options=grid, **asdict(options))
    except (
        AssertionError
    ) as error:  # torchdiffeq's error for a step of no size or a velocity that is not finite
        given = f"atol={options.atol}, rtol={options.rtol}"
        raise ValueError(f"dopri5 must be able to keep its tolerances, got {given}: {error}") from error
    assert isinstance(path, Tensor)  # a tuple only for a state that is one
    return path[-1].to(x.dtype)


@SAMPLERS.register("sde-euler", stochastic=True)
def sde_euler(v: Velocity, x: Tensor, times: Sequence[float], *, noise: Draw) -> Tensor:
    """Returns x at the last time by Euler-Maruyama on dx = (v + w·score) dt + √(2w) dW with w = 1 − t.

    At every time the state is distributed as the ODE's. The last update adds no noise.

    Args:
        v: (x_t, t) → velocity of the shape of x_t.
        x: State at the first time, (B, …); the integration runs in its dtype.
        times: Increasing times, as `time_grid` gives them.
        noise: Draws N(0, 1) of the shape of x for the update of this number.

    Source: SiT (Ma et al. 2024), eq. (4), whose w_t is 2w here; its released code and LightningDiT's
        with `diffusion_form="sigma"`.
    """
    last = len(times) - 2
    for step, (t, t_next) in enumerate(pairwise(times)):
        v_t, w = v(x, t).to(x.dtype), 1 - t
        drift = v_t + w * score(x, v_t, t)
        x = x + (t_next - t) * drift
        if step < last:
            x = x + math.sqrt(2 * w * (t_next - t)) * noise(step).to(x)
    return x
