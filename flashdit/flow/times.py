"""Which times are trained on: distributions over [0, 1] by name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashdit.shared.registry import Registry, check_finite

TIMES = Registry("time distribution")


@dataclass(kw_only=True)
class UniformOptions:
    """Uniform times have no options."""


@dataclass(kw_only=True)
class LogitNormalOptions:
    """Options of t = sigmoid(mean + std · N(0, 1))."""

    mean: float = 0.0
    """Below 0, more noise."""
    std: float = 1.0

    def __post_init__(self):
        check_finite(self, "flow.times.")
        if self.std <= 0:
            raise ValueError(f"std of logit-normal times must be positive, got {self.std}")


class Uniform:
    """Uniform draws (B,) in [0, 1) → times: themselves."""

    def __init__(self, options: UniformOptions):
        pass

    def __call__(self, uniform: Tensor) -> Tensor:
        """Returns the times of these uniform draws."""
        return uniform


TIMES.register("uniform", UniformOptions)(Uniform)


class LogitNormal:
    """Uniform draws (B,) in [0, 1) → times: sigmoid of the normal quantile.

    Args:
        options: Mean and standard deviation of logit(t).

    Source: Esser et al. 2024 (SD3), eq. (19); LightningDiT's use_lognorm has mean 0 and std 1.
    """

    def __init__(self, options: LogitNormalOptions):
        self.options = options

    def __call__(self, uniform: Tensor) -> Tensor:
        """Returns the times of these uniform draws."""
        eps = 1e-7  # a draw of exactly 0 would be a time of exactly 0, at an infinite quantile
        normal = uniform.double().clamp(eps, 1 - eps).mul(2).sub(1).erfinv().mul(2**0.5)
        return (self.options.mean + self.options.std * normal).sigmoid().to(uniform.dtype)


TIMES.register("logit_normal", LogitNormalOptions)(LogitNormal)
