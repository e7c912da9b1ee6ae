"""Linear probability path. Time runs from 0 (noise) to 1 (data); diffusers' sigma is 1 − t."""

from __future__ import annotations

from torch import Tensor


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Returns t (B,) shaped (B, 1, …, 1), to meet a batch of any rank."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Returns x_t = t·x_1 + (1 − t)·x_0.

    Args:
        x_0: Noise (B, …).
        x_1: Data (B, …).
        t: Times (B,) in [0, 1].

    Source: LightningDiT's Linear path.
    """
    t = per_sample(t, x_1)
    return t * x_1 + (1 - t) * x_0


def velocity(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Returns u_t = dx_t/dt = x_1 − x_0, the same at every time."""
    return x_1 - x_0


def data_prediction(x_t: Tensor, v_t: Tensor, t: float) -> Tensor:
    """Returns x_1 as the velocity predicts it: where x_t would be at time 1, x_t + (1 − t)·v_t."""
    return x_t + (1 - t) * v_t


def score(x_t: Tensor, v_t: Tensor, t: float) -> Tensor:
    """Returns ∇ log p_t(x_t) = (t·v_t − x_t) / (1 − t).

    Args:
        x_t: State (B, …) at time t.
        v_t: The marginal velocity there.
        t: Time in [0, 1).

    Source: SiT (Ma et al. 2024), eq. (9), for the linear path.
    """
    return (t * v_t - x_t) / (1 - t)
