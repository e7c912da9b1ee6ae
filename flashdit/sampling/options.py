"""Options of sampling: the whole recipe beside the model and the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdit.flow.guidance import check_interval, evaluations
from flashdit.flow.samplers import ADAPTIVE, make_sampler, time_grid
from flashdit.shared.registry import unknown
from flashdit.training.options import DTYPES


@dataclass(kw_only=True)
class SamplingOptions:
    """Options of sampling: the whole recipe beside the model and the labels."""

    sampler: str = "euler"
    steps: int = 50
    """Updates of the sampler; an adaptive one takes as many as its tolerances ask for."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is the conditional model, 0 the unconditional one."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance acts, 0 noise and 1 data."""
    shift: float = 1.0
    """Below 1, finer steps near noise."""
    seed: int = 0
    batch_size: int = 100
    """Images generated at once; changes no image."""
    height: int | None = None
    """In pixels; None is the training size."""
    width: int | None = None
    dtype: str = "fp32"
    """`fp32`, or `bf16` or `fp16` for the model's matrix products; the state and the VAE stay in fp32."""
    atol: float = 1e-5
    """Absolute tolerance of an adaptive sampler."""
    rtol: float = 1e-5
    """Relative tolerance of an adaptive sampler."""

    def __str__(self) -> str:
        """Returns what a picture's title says of the sampling."""
        low, high = self.cfg_interval
        steps = "" if self.sampler in ADAPTIVE else f" {self.steps}"
        times = "" if (low, high) == (0, 1) or self.cfg_scale == 1 else f" for t in {low:g} to {high:g}"
        return f"{self.sampler}{steps}, guidance {self.cfg_scale:g}{times}"

    def check(self) -> list[float]:
        """Returns the time grid, or raises ValueError for an option that cannot be."""
        make_sampler(self.sampler, noise=torch.zeros)
        check_interval(self.cfg_interval)
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale must be finite, got {self.cfg_scale}")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (self.atol > 0 and self.rtol > 0):
            raise ValueError(f"atol and rtol must be positive, got {self.atol} and {self.rtol}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        return time_grid(self.steps, self.shift)


def nfe(options: SamplingOptions) -> int | None:
    """Returns how many model evaluations one image takes, a guided one counting two.

    None for an adaptive sampler, where it differs by image: `Batch.nfe` has what was measured.
    """
    times, count = options.check(), 0
    if options.sampler in ADAPTIVE:
        return None

    def v(x: Tensor, t: float) -> Tensor:
        nonlocal count
        count += evaluations(t, options.cfg_scale, options.cfg_interval)
        return x

    make_sampler(options.sampler, noise=lambda _step: torch.zeros(1))(v, torch.zeros(1), times)
    return count
