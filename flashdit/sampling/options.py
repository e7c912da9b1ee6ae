"""Options of sampling: all that decides an image beside the model and its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flashdit.flow.guidance import check_interval, evaluations
from flashdit.flow.samplers import SAMPLERS, Draw, Sampler, check_grid, time_grid
from flashdit.sampling.records import current_sampling, sampler_name
from flashdit.shared.process import AUTO, AUTOCAST
from flashdit.shared.registry import check_finite, counted, unknown
from flashdit.shared.seeds import check_seed


@dataclass(kw_only=True)
class SamplingOptions:
    """Options of sampling, checked when made: all that decides an image beside the model and its label."""

    sampler: Any = "euler"
    """A sampler's name, or `{name, **options}` for one that has options."""
    steps: int = 50
    """Updates of the sampler; an adaptive one takes as many as its tolerances ask for."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is the conditional model, 0 the unconditional one."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance acts, 0 noise and 1 data."""
    cfg_channels: int | None = None
    """How many leading channels are guided; None guides all, 3 is how LightningDiT's and DiT's numbers came
    about."""
    shift: float = 1.0
    """Below 1, finer steps near noise."""
    seed: int = 0
    """Sample i depends on the seed and i alone."""
    batch_size: int = 100
    """Images generated at once; changes no image."""
    height: int | None = None
    """In pixels; None is the training size."""
    width: int | None = None
    """In pixels; None is the training size."""
    precision: str = "fp32"
    """What the model computes in: `fp32`, `tf32` (fp32 on a CPU), `bf16` or `fp16`; `auto` is bf16 where the
    device multiplies it faster, else fp32. The state and the VAE stay in fp32."""

    def __post_init__(self):
        name, options = SAMPLERS.options(self.sampler)
        self.sampler = {"name": name, **asdict(options)} if fields(options) else name
        low, high = self.cfg_interval
        self.cfg_interval = (low, high)  # JSON and YAML have lists
        check_finite(self)
        check_interval(self.cfg_interval, "cfg_interval")
        if self.precision not in (*AUTOCAST, AUTO):
            raise unknown("precision", self.precision, (*AUTOCAST, AUTO))
        for key in ("batch_size", "cfg_channels", "height", "width"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
            if value is not None and value >= 2**31:
                raise ValueError(f"{key} must be below 2^31, got {value}")
        check_seed(self.seed, "seed")
        check_grid(self.steps, self.shift)

    @staticmethod
    def current(record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns recorded options under today's keys, for whoever reads a configuration."""
        return current_sampling(record)

    @property
    def sampler_name(self) -> str:
        """The sampler's name, without its options."""
        return sampler_name(self.sampler)

    @property
    def is_adaptive(self) -> bool:
        """Whether the sampler chooses its steps: it integrates one image at a time."""
        return SAMPLERS[self.sampler_name].adaptive

    @property
    def times(self) -> list[float]:
        """The steps + 1 times from 0 to 1."""
        return time_grid(self.steps, self.shift)

    @property
    def nfe(self) -> int | None:
        """Model evaluations an image takes, a guided one counting two; None where they differ by image."""
        if self.is_adaptive:
            return None
        count = 0

        def v(x: Tensor, t: float) -> Tensor:
            nonlocal count
            count += evaluations(t, self.cfg_scale, self.cfg_interval, self.cfg_channels)
            return x

        self.make_sampler(lambda _step: torch.zeros(1))(v, torch.zeros(1), self.times)
        return count

    def make_sampler(self, noise: Draw) -> Sampler:
        """Returns the sampler, which draws noise by this function if it draws any."""
        jumps = () if self.cfg_scale == 1 else self.cfg_interval
        return SAMPLERS.build(self.sampler, noise, jumps)

    def __str__(self) -> str:
        """Returns what a picture's title says of the sampling."""
        low, high = self.cfg_interval
        steps = "" if self.is_adaptive else f" {self.steps}"
        times = "" if (low, high) == (0, 1) or self.cfg_scale == 1 else f" for t in {low:g} to {high:g}"
        guided = self.cfg_scale != 1 and self.cfg_channels is not None
        channels = f" on {counted(self.cfg_channels or 0, 'channel')}" if guided else ""
        return f"{self.sampler_name}{steps}, guidance {self.cfg_scale:g}{channels}{times}"
