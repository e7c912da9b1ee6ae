"""What a run measures between two records: means of its losses, speed, waiting, memory."""

from __future__ import annotations

import logging
import resource
import sys
import time
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flashdit.shared.process import AUTOCAST

logger = logging.getLogger(__name__)
SMALL_SIDE, SLOW = 256, 1.5
"""Of matrices whose product is quick in any precision; times float32's duration that are told."""
TIMINGS = ("images_per_s", "mfu", "data_wait", "peak_memory_gib")  # keys that differ from run to run


class Meter:
    """Sums over the optimiser steps of one interval; values stay on the device until they are asked for.

    Args:
        device: Where the run computes.
        flops_per_image: Of a forward and backward pass; None where it is not known.

    Attributes:
        peak_flops: Of one device, once it has been measured.
    """

    def __init__(self, device: torch.device, flops_per_image: float | None):
        self.device, self.flops_per_image = device, flops_per_image
        self.peak_flops: float | None = None
        self.start()

    def start(self) -> None:
        """Starts a new interval."""
        self.sums: dict[str, Any] = {}
        self.step_values: dict[str, Any] = {}
        self.updates = 0

    def start_clock(self, images_seen: int) -> None:
        """Starts to measure speed from here on."""
        self.waited_s, self.first_image = 0.0, images_seen
        self.started = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Returns the interval's sums, which a resumed run goes on with."""
        sums = {name: torch.as_tensor(value).cpu() for name, value in self.sums.items()}
        return {"sums": sums, "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on with saved sums."""
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.updates = state["updates"]

    def add(self, name: str, value: Tensor) -> None:
        """Adds a value of the step that is being made."""
        self.step_values[name] = self.step_values.get(name, 0) + value.detach()

    def end_step(self, counted: bool) -> None:
        """Takes the step's values into the interval; those of a skipped step, not finite, are dropped."""
        if counted:
            for name, value in self.step_values.items():
                self.sums[name] = self.sums.get(name, 0) + value
            self.updates += 1
        self.step_values = {}

    def means(self) -> tuple[list[str], Tensor]:
        """Returns names and their means (names,) over the interval's steps, empty if all were skipped."""
        values = [torch.as_tensor(value, device=self.device).float() for value in self.sums.values()]
        stacked = torch.stack(values) if values else torch.zeros(0, device=self.device)
        return list(self.sums), stacked / max(1, self.updates)

    def timings(self, images_seen: int, processes: int) -> dict[str, float]:
        """Returns the speed since the clock started: images/s of all processes, MFU, waiting, peak GiB."""
        elapsed_s = time.perf_counter() - self.started
        speed = (images_seen - self.first_image) / elapsed_s
        timings = {"images_per_s": speed, "data_wait": self.waited_s / elapsed_s}
        if self.flops_per_image and self.peak_flops:
            timings["mfu"] = speed * self.flops_per_image / (self.peak_flops * processes)
        return timings | {"peak_memory_gib": peak_memory_bytes(self.device) / 2**30}


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory held so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def warn_if_slow(precision: str, device: torch.device) -> None:
    """Warns, once, of a precision whose matrix products take longer than float32's on a CPU: it is measured.

    Args:
        precision: One of `AUTOCAST`.
        device: Where the model computes.
    """
    dtype = AUTOCAST[precision]
    if device.type != "cpu" or dtype is None:
        return
    times = matmul_peak(device, torch.float32, SMALL_SIDE) / matmul_peak(device, dtype, SMALL_SIDE)
    if times > SLOW:
        logger.warning(
            "precision %s is slow on this CPU: its matrix products take %.1f times as long as fp32's",
            *(precision, times),
        )


def matmul_peak(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """Returns the FLOP/s of a square matrix product, the best of nine: the peak that MFU is of.

    Args:
        device: Where it is computed.
        dtype: Of the matrices.
        side: Of the matrices; None takes large ones, for the kind of device.
    """
    side = side or (8192 if device.type == "cuda" else 768)
    draws = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, device=device, generator=draws).to(dtype)  # equal ones cost less power
    best = 0.0
    for _ in range(10):  # the first warms up
        started = time.perf_counter()
        torch.matmul(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best
