"""What `benchmarks.flashdit` times: one transformer at one latent size, in each of its parts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from flashdit.models.costs import forward_flops
from flashdit.models.dit import FlashDiT
from flashdit.models.sizes import SIZES
from flashdit.training.ema import Ema, EmaOptions
from flashdit.training.optim import OptimizerOptions, make_optimizer

MODELS = {
    "LightningDiT": {"attention": {"name": "global", "rope": True}, "position_embedding": "sincos"},
    "FlashDiT": {"attention": {"name": "iwin", "window": 4, "kernel": 3}},
}
FORWARD, BACKWARD, STEP = "forward", "forward + backward", "full step"
ATTENTION, ATTENTION_BACKWARD = "attention forward", "attention forward + backward"
PARTS = (FORWARD, BACKWARD, STEP, ATTENTION, ATTENTION_BACKWARD)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Run = Callable[[], object]


class Subject:
    """One model at one latent size: random weights, inputs, and a function for each part.

    Args:
        name: Of MODELS.
        side: Rows and columns of the latents.
        batch: Images.
        compiled: Whether each block, and the attention alone, go through torch.compile.
        arguments: Size, depth, device and dtype.
    """

    def __init__(self, name: str, side: int, batch: int, compiled: bool, arguments: argparse.Namespace):
        torch.manual_seed(0)
        self.device, self.dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
        self.options = {**SIZES[arguments.size], **MODELS[name], "sample_size": side}
        self.options["depth"] = arguments.depth
        with self.device:
            self.model = FlashDiT(**self.options)
            for parameter in self.model.parameters():  # no gate stays shut
                if parameter.requires_grad and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            width = self.options["hidden_size"]
            self.x, self.t = torch.randn(batch, 32, side, side), torch.rand(batch)
            self.y, self.target = torch.randint(1000, (batch,)), torch.randn(batch, 32, side, side)
            self.map = torch.randn(batch, side, side, width, dtype=self.dtype, requires_grad=True)
            self.upstream = torch.randn(batch, side, side, width)
        self.attention = cast(nn.Module, self.model.blocks[0].attn)
        if compiled:
            for block in self.model.blocks:
                block.compile(dynamic=False)
            self.attention = cast(nn.Module, torch.compile(self.attention, dynamic=False))

    def flops(self, part: str) -> float | None:
        """Returns the FLOPs of one image in a part of the whole model; the backward pass counts twice."""
        if part in (ATTENTION, ATTENTION_BACKWARD):
            return None
        return forward_flops(self.options) * (1 if part == FORWARD else 3)

    def run(self, part: str) -> Run:
        """Returns the function of a part."""
        if part in (FORWARD, ATTENTION):
            return self._forward if part == FORWARD else self._attention_forward
        if part == ATTENTION_BACKWARD:
            return self._attention_backward
        if part == BACKWARD:
            return self._backward
        optimizer = make_optimizer(self.model.parameters(), OptimizerOptions())
        ema = Ema(self.model, EmaOptions())

        def step() -> None:
            self._backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            ema.update(self.model)

        return step

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def _forward(self) -> None:
        self.model.eval()
        with torch.no_grad(), self._precision():
            self.model(self.x, self.t, self.y)

    def _backward(self) -> None:
        self.model.train().zero_grad()
        with self._precision():
            v_t = self.model(self.x, self.t, self.y)
        F.mse_loss(v_t.float(), self.target).backward()

    def _attention_forward(self) -> None:
        with torch.no_grad(), self._precision():
            self.attention(self.map)

    def _attention_backward(self) -> None:
        self.map.grad = None
        self.attention.zero_grad()
        with self._precision():
            out = self.attention(self.map)
        out.backward(self.upstream.to(out.dtype))


class Clock:
    """Times a run by the wall and by the device: CUDA events, or processor time with one CPU thread.

    Processor time leaves out what other programs took of the machine. With several threads it is no measure
    of how long a run takes; the wall then stands for both.
    """

    def __init__(self, device: str):
        self.device = torch.device(device)
        one_thread = torch.get_num_threads() == 1
        self.unit = "CUDA events" if self.device.type == "cuda" else "processor" if one_thread else "wall"

    def time(self, run: Run) -> tuple[float, float]:
        """Returns seconds by the device and by the wall."""
        if self.device.type == "cuda":
            return self._time_on_gpu(run)
        wall, processor = time.perf_counter(), time.process_time()
        run()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        return (processor if self.unit == "processor" else wall), wall

    def _time_on_gpu(self, run: Run) -> tuple[float, float]:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        wall = time.perf_counter()
        started.record()
        run()
        ended.record()
        torch.cuda.synchronize(self.device)
        return started.elapsed_time(ended) / 1e3, time.perf_counter() - wall
