"""Guidance as a wrapper: the velocities with and without a class, or of two models, become one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VelocityModel = Callable[..., Tensor]
"""(x_t (B, …), t (B,), y (B,)) → v; one of mean flows takes `duration` and `guidance` (B,) too."""
Velocity = Callable[[Tensor, float], Tensor]
"""(x_t, t) → v, at one time for the whole batch."""
TIME_ROUNDING = 1e-9  # a grid time that means an end of the interval meets it this closely


def check_interval(interval: tuple[float, float], name: str = "the guidance interval") -> None:
    """Raises ValueError unless 0 ≤ low ≤ high ≤ 1; `name` is what the message calls the interval."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name} must be 0 ≤ low ≤ high ≤ 1 in time, got {low} {high}")


def scale_at(t: float, scale: float, interval: tuple[float, float]) -> float:
    """Returns the guidance scale at time t: 1, the conditional model, outside the interval."""
    low, high = interval
    return scale if low - TIME_ROUNDING <= t <= high + TIME_ROUNDING else 1.0


def evaluations(t: float, scale: float, interval: tuple[float, float], channels: int | None = None) -> int:
    """Returns how many model evaluations an image takes at time t: two where both velocities are needed."""
    now = scale_at(t, scale, interval)
    return 1 if now == 1 or (now == 0 and channels is None) else 2


def guide(
    model: VelocityModel,
    labels: Tensor,
    null_label: int,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    guiding: VelocityModel | None = None,
) -> Velocity:
    """Returns v(x_t, t) = v_uncond + scale · (v_cond − v_uncond) inside the interval, v_cond outside it.

    With a guiding model, v_guide of the same labels stands in place of v_uncond, which is not evaluated.
    At scale 1 and outside the interval the model runs once on B samples, at scale 0 what it is guided away
    from; otherwise once on 2B, or each of the two models on B.

    Args:
        model: (x (B, …), t (B,), y (B,)) → v.
        labels: Labels (B,) int64.
        null_label: The label of no class.
        scale: 1 is the conditional model, 0 the unconditional one or the guiding model.
        interval: Times (low, high), both included, in which guidance acts.
        channels: How many leading channels are guided; None guides all, 3 is LightningDiT's legacy form.
        guiding: A worse model of the same data, which autoguidance leads away from; None is classifier-free
            guidance.

    Raises:
        ValueError: If the interval is reversed or leaves [0, 1].

    Source: Ho & Salimans 2022, eq. (6), written for velocities; interval: Kynkäänniemi et al. 2024;
    autoguidance: Karras et al. 2024 (arXiv 2406.02507), D_w = w·D_1 + (1 − w)·D_0.
    """
    check_interval(interval)
    null = torch.full_like(labels, null_label)

    def v(x_t: Tensor, t: float) -> Tensor:
        """Returns the guided velocity of x_t at one time for the whole batch."""
        times = torch.full((x_t.shape[0],), t, device=x_t.device)
        now = scale_at(t, scale, interval)
        if now == 1:
            return model(x_t, times, labels)
        if now == 0 and channels is None:
            return model(x_t, times, null) if guiding is None else guiding(x_t, times, labels)
        if guiding is None:
            both = model(torch.cat([x_t, x_t]), times.repeat(2), torch.cat([labels, null]))
            v_cond, v_other = both.chunk(2)
        else:
            v_cond, v_other = model(x_t, times, labels), guiding(x_t, times, labels)
        guided = v_other + now * (v_cond - v_other)
        # Differs from LightningDiT: guidance acts on all channels unless the legacy form is asked for.
        return guided if channels is None else torch.cat([guided[:, :channels], v_cond[:, channels:]], dim=1)

    return v
