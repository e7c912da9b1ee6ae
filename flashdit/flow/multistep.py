"""Samplers that reuse earlier evaluations: DPM-Solver++(2M) and UniPC, exponential integrators in log-SNR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from flashdit.flow.guidance import Velocity
from flashdit.flow.path import data_prediction
from flashdit.flow.samplers import SAMPLERS


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


@SAMPLERS.register("dpm++2m")
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


@SAMPLERS.register("unipc")
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
