"""Samplers by name: each carries dx/dt = v(x, t) from t = 0 (noise) to 1 (data) along a grid of times.

The state keeps its dtype; every coefficient is a Python float, finite at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashdit.flow.guidance import Velocity
from flashdit.shared.registry import Registry

Sampler = Callable[[Velocity, Tensor, Sequence[float]], Tensor]
"""(v, x, times) → x at the last time; v is (x_t, t) → velocity."""
Draw = Callable[[int], Tensor]
MAX_STEPS = 1_000_000


@dataclass(kw_only=True)
class NoOptions:
    """Options of a sampler that has none."""


@dataclass(frozen=True, kw_only=True)
class SamplerEntry:
    """A registered sampler."""

    integrate: Callable[..., Tensor]
    """`(v, x, times)`, and by keyword `options`, `noise` and `jumps` where the fields below ask for them."""
    options_type: type = NoOptions
    """Dataclass of its options, which checks them; with fields, the sampler takes `options`."""
    adaptive: bool = False
    """Whether it chooses its steps: it integrates one image at a time and takes `jumps`, the times where the
    velocity jumps."""
    stochastic: bool = False
    """Whether it takes `noise`: update number → N(0, 1) of the shape of the state."""

    def build(self, options: Any, noise: Draw, jumps: Sequence[float] = ()) -> Sampler:
        """Returns the sampler with what it needs beside velocity, state and times."""
        needs: dict[str, Any] = {"options": options} if fields(self.options_type) else {}
        needs |= {"jumps": jumps} if self.adaptive else {}
        needs |= {"noise": noise} if self.stochastic else {}
        return partial(self.integrate, **needs)


class SamplerRegistry(Registry[SamplerEntry]):
    """Samplers by name; `build(spec, noise, jumps)` gives one."""

    def register(
        self,
        name: str,
        options_type: type = NoOptions,
        *,
        adaptive: bool = False,
        stochastic: bool = False,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Returns a decorator that registers a function; `SamplerEntry` says which arguments it gets."""

        def registered(integrate: Callable[..., Tensor]) -> Callable[..., Tensor]:
            entry = SamplerEntry(
                integrate=integrate, options_type=options_type, adaptive=adaptive, stochastic=stochastic
            )
            self.add(name, entry)
            return integrate

        return registered


SAMPLERS = SamplerRegistry("sampler", "flashdit.samplers")


def check_grid(steps: int, shift: float) -> None:
    """Raises ValueError unless 1 ≤ steps ≤ MAX_STEPS, and shift is positive and finite."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if steps > MAX_STEPS:
        raise ValueError(f"steps must be at most {MAX_STEPS:,}, got {steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive, got {shift}")


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """Returns steps + 1 times from 0 to 1.

    With lin evenly spaced, t = shift · lin / (1 + (shift − 1) · lin): below 1 the steps are finer near noise.

    Args:
        steps: Updates; LightningDiT's `num_steps` counts points, one more.
        shift: Positive; 1 leaves the times evenly spaced.

    Raises:
        ValueError: If steps or shift is invalid.

    Source: LightningDiT's transport (timestep_shift), Esser et al. 2024 eq. (23).
    """
    check_grid(steps, shift)
    lin = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return (shift * lin / (shift * lin + (1 - lin))).tolist()  # the ends are 0 and 1 to the bit
