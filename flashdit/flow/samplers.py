"""Samplers as functions of a velocity: they carry dx/dt = v(x, t) from t = 0 (noise) to 1 (data).

The state keeps its dtype; every coefficient is a Python float, finite at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torchdiffeq import odeint

from flashdit.flow.guidance import Velocity
from flashdit.flow.path import data_prediction, score
from flashdit.shared.registry import unknown

Sampler = Callable[[Velocity, Tensor, Sequence[float]], Tensor]
Draw = Callable[[int], Tensor]


MAX_STEPS = 1_000_000


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
    if steps > MAX_STEPS:
        raise ValueError(f"steps must be at most {MAX_STEPS:,}, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive, got {shift}")
    lin = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (shift * lin / (shift * lin + (1 - lin))).tolist()  # the ends are 0 and 1 to the bit


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


def log_snr(t: float) -> float:
    """Returns λ = log(t / (1 − t)): −∞ at noise, ∞ at data."""
    return -math.inf if t <= 0 else math.inf if t >= 1 else math.log(t / (1 - t))


def toward(x: Tensor, x_1: Tensor, t: float, t_next: float) -> Tensor:
    """Returns the state at t_next of a flow that heads for x_1: the exact solution if x_1 stays the same."""
    return ((1 - t_next) * x + (t_next - t) * x_1) / (1 - t)


def extrapolate(x_1: Tensor, earlier: Tensor, lambdas: Sequence[float]) -> Tensor:
    """Returns the second-order estimate of x_1 over the update from λ to λ_next.

    Args:
        x_1: Predicted at λ.
        earlier: Predicted at λ_earlier.
        lambdas: (λ_earlier, λ, λ_next). With λ_next = ∞, or λ_earlier = −∞, the first order is all there is.
    """
    before, here, after = lambdas
    return x_1 if math.isinf(after) else x_1 + (x_1 - earlier) * ((after - here) / (here - before) / 2)


def dpmpp_2m(v: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Returns x at the last time by DPM-Solver++(2M): second order, one evaluation an update.

    The last update is of first order, as in diffusers' `lower_order_final`.

    Args:
        v: (x_t, t) → velocity of the shape of x_t.
        x: State at the first time, (B, …); the integration runs in its dtype.
        times: Increasing times, as `time_grid` gives them.

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2, with α = t, σ = 1 − t.
    """
    earlier, before = None, -math.inf
    for t, t_next in pairwise(times):
        x_1 = data_prediction(x, v(x, t).to(x.dtype), t)
        lambdas = (before, log_snr(t), log_snr(t_next))
        aim = x_1 if earlier is None else extrapolate(x_1, earlier, lambdas)
        x = toward(x, aim, t, t_next)
        earlier, before = x_1, lambdas[1]
    return x


def unipc(v: Velocity, x: Tensor, times: Sequence[float]) -> Tensor:
    """Returns x at the last time by UniPC-2 with B(h) = e^h − 1: one evaluation an update.

    Each evaluation serves twice: it corrects the update that led to its point, and starts the next one. On a
    grid from 0 to 1 the first and the last update, of lower order as in diffusers, leave second order in all.

    Args:
        v: (x_t, t) → velocity of the shape of x_t.
        x: State at the first time, (B, …); the integration runs in its dtype.
        times: Increasing times, as `time_grid` gives them.

    Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 1 and 2, data prediction, α = t, σ = 1 − t.
    """
    lambdas = [log_snr(t) for t in times]
    start, predictions = x, []
    for i, (t, t_next) in enumerate(pairwise(times)):
        x_1 = data_prediction(x, v(x, t).to(x.dtype), t)
        if i > 0:
            aim = correction(x_1, predictions, lambdas[max(i - 2, 0) : i + 1])
            x = toward(start, aim, times[i - 1], t)
        start, predictions = x, [*predictions[-1:], x_1]
        aim = x_1 if i == 0 else extrapolate(x_1, predictions[-2], lambdas[i - 1 : i + 2])
        x = toward(x, aim, t, t_next)
    return x


def correction(x_1: Tensor, predictions: Sequence[Tensor], lambdas: Sequence[float]) -> Tensor:
    """Returns UniC's estimate of x_1 over the update that led to where x_1 is predicted.

    Args:
        x_1: Predicted at the end of the update.
        predictions: Those at its start and, from the second update on, before it, in the order of time.
        lambdas: λ of each prediction, and of the end.
    """
    start = predictions[-1]
    if len(predictions) == 1:
        return start + (x_1 - start) / 2
    before, here, after = lambdas
    h = after - here
    ratio = (before - here) / h
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    rho = (b_1 - b_2) / (1 - ratio)  # solves [[1, 1], [ratio, 1]] · (rho, b_1 − rho) = (b_1, b_2)
    return start + (predictions[-2] - start) * (rho / ratio) + (x_1 - start) * (b_1 - rho)


def dopri5(
    v: Velocity,
    x: Tensor,
    times: Sequence[float],
    *,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    jumps: Sequence[float] = (),
) -> Tensor:
    """Returns x at the last time by Dormand and Prince's adaptive method of order 5.

    One step size serves the whole of x: for an image that depends on no other, give one image at a time.

    Args:
        v: (x_t, t) → velocity of the shape of x_t.
        x: State at the first time, (B, …); the integration runs in float32 at least.
        times: Increasing times, of which the first and the last alone matter.
        atol: Absolute tolerance of a step.
        rtol: Relative tolerance of a step.
        jumps: Times where v jumps, such as the ends of the guidance interval.

    Source: torchdiffeq; Dormand & Prince 1980.
    """
    start, end = times[0], times[-1]
    state = x.to(torch.promote_types(x.dtype, torch.float32))
    inside = [t for t in sorted(set(jumps)) if start < t < end]
    options = {"step_t": state.new_tensor([end], dtype=torch.float64)}  # no evaluation beyond the end
    if inside:
        options["jump_t"] = state.new_tensor(inside, dtype=torch.float64)
    span = state.new_tensor([start, end], dtype=torch.float64)

    def slope(t: Tensor, x_t: Tensor) -> Tensor:
        return v(x_t, float(t)).to(x_t.dtype)

    try:
        path = odeint(slope, state, span, method="dopri5", atol=atol, rtol=rtol, options=options)
    except AssertionError as error:  # torchdiffeq's word for a step of no size, or a velocity not finite
        raise ValueError(
            f"dopri5 must be able to keep its tolerances, got {atol=}, {rtol=}: {error}"
        ) from error
    assert isinstance(path, Tensor)  # a tuple only for a state that is one
    return path[-1].to(x.dtype)


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


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "dpm++2m": dpmpp_2m,
    "unipc": unipc,
    "dopri5": dopri5,
    "sde-euler": sde_euler,
}
ADAPTIVE = frozenset({"dopri5"})
"""Samplers that choose their steps by what they see; they take one image at a time and no number of steps."""


def make_sampler(
    name: str, noise: Draw, *, atol: float = 1e-5, rtol: float = 1e-5, jumps: Sequence[float] = ()
) -> Sampler:
    """Returns the sampler of this name with what it needs beside velocity, state and times.

    Args:
        name: One of `SAMPLERS`.
        noise: What `sde_euler` draws.
        atol: Of an adaptive sampler.
        rtol: Of an adaptive sampler.
        jumps: Of an adaptive sampler.

    Raises:
        ValueError: If the name is not known.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if name in ADAPTIVE:
        return partial(SAMPLERS[name], atol=atol, rtol=rtol, jumps=jumps)
    return partial(SAMPLERS[name], noise=noise) if name == "sde-euler" else SAMPLERS[name]
