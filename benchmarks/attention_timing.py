"""Seconds, memory and multiply-adds of the study's kinds, all timed in turn on one thread."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.attention_kinds import (
    KINDS,
    MODEL,
    PRECISION,
    RECIPE,
    SIZES,
    Size,
    model_arguments,
    register_convolution,
)
from benchmarks.side_by_side import interleaved, machine, summary
from flashdit.flow.loss import LossOptions, flow_loss
from flashdit.flow.path import interpolate, velocity
from flashdit.models.costs import forward_flops
from flashdit.models.dit import FlashDiT
from flashdit.models.sizes import SIZES as WIDTHS
from flashdit.shared.process import computing_in, keep_freed_memory
from flashdit.training.ema import Ema, EmaOptions
from flashdit.training.optim import OptimizerOptions, make_optimizer

BLOCK_ROUNDS, BLOCK_SIDES = 3, (16, 32)
CPU = torch.device("cpu")


def make_model(size: Size, kind: str) -> FlashDiT:
    """Returns a new model of a kind, none of its gates shut."""
    torch.manual_seed(0)
    model = FlashDiT(**model_arguments(size, kind), prediction=RECIPE["flow"]["prediction"])
    open_gates(model)
    return model


def open_gates(model: FlashDiT) -> None:
    """Gives weights that start at zero small random values, as after some steps."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)


def forward_and_step(size: Size, kind: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns the forward pass of a batch, and a training step on it; no letters are drawn for either."""
    model = make_model(size, kind)
    optimizer = make_optimizer(model.parameters(), OptimizerOptions(**RECIPE["optimizer"]))
    ema = Ema(model, EmaOptions(**RECIPE["ema"]))
    shape = (size.batch, MODEL["in_channels"], MODEL["sample_size"], MODEL["sample_size"])
    x_1, x_0 = torch.randn(shape), torch.randn(shape)
    t, y = torch.rand(size.batch), torch.randint(MODEL["num_classes"], (size.batch,))

    def forward() -> None:
        model.eval()
        with torch.no_grad(), computing_in(PRECISION, CPU):
            model(x_1, t, y)

    def step() -> None:
        model.train()
        with computing_in(PRECISION, CPU):
            v_t = model(interpolate(x_0, x_1, t), t, y)
        loss, _ = flow_loss(v_t.float(), velocity(x_0, x_1), LossOptions(**RECIPE["flow"]["loss"]))
        loss.mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)

    return forward, step


def measure_size(size: Size) -> dict[str, Any]:
    """Returns for each kind of a size the processor seconds of step and forward pass, and other costs."""
    about, runs = machine(), {}
    about["memory_kept"] = keep_freed_memory()
    for kind in size.kinds:
        runs[f"{kind} forward"], runs[f"{kind} step"] = forward_and_step(size, kind)
    taken = interleaved(runs, size.rounds, f"{size.side}²", time.process_time)
    kinds = {}
    for kind in size.kinds:
        parameters = list(make_model(size, kind).parameters())
        forward = summary(taken[f"{kind} forward"], taken[f"{size.kinds[0]} forward"])
        kinds[kind] = {
            "step": summary(taken[f"{kind} step"], taken[f"{size.kinds[0]} step"]),
            "forward": forward,
            "images_per_s": size.batch / forward["median_s"],
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "multiply_adds": forward_flops(model_arguments(size, kind)) // 2,
            "peak_memory_gib": step_memory(size, kind) / 2**30,
        }
    return {"machine": about, "side": size.side, "batch": size.batch, "rounds": size.rounds, "kinds": kinds}


def step_memory(size: Size, kind: str) -> int:
    """Returns by how many bytes a fresh process grows that makes a model and two steps of a kind."""
    command = [sys.executable, "-m", "benchmarks.attention_timing", str(size.side), str(size.batch), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure_blocks() -> dict[str, Any]:
    """Returns processor seconds of attention and of its block, at the study's width and at XL's."""
    about, rows = machine(), []
    about["memory_kept"] = keep_freed_memory()
    widths = {"study": (MODEL["hidden_size"], MODEL["num_heads"])}
    widths["XL"] = (WIDTHS["XL"]["hidden_size"], WIDTHS["XL"]["num_heads"])
    for name, (width, heads) in widths.items():
        for side in BLOCK_SIDES:
            batch = 4 if name == "study" else 1
            runs = {}
            for kind in ("global", "iwin4", "iwin8"):
                attention = KINDS[kind].model(side)["attention"]
                arguments = {"hidden_size": width, "num_heads": heads, "depth": 1, "sample_size": side}
                runs |= block_runs(kind, FlashDiT(**arguments, attention=attention), batch)
            taken = interleaved(runs, BLOCK_ROUNDS, f"block of {name}, {side}²", time.process_time)
            rows += [
                {"width": name, "channels": width, "side": side, "batch": batch, "kind": kind}
                | block_shares(*(taken[f"{kind} {part}"] for part in ("attention", "block")))
                for kind in ("global", "iwin4", "iwin8")
            ]
    return {"machine": about, "rounds": BLOCK_ROUNDS, "rows": rows}


def block_runs(kind: str, model: FlashDiT, batch: int) -> dict[str, Callable[[], None]]:
    """Returns forward and backward pass of a block, and of its attention alone."""
    open_gates(model)
    width, side = model.config["hidden_size"], model.config["sample_size"]
    x, cond = torch.randn(batch, side, side, width, requires_grad=True), torch.randn(batch, width)
    upstream, block = torch.randn(batch, side, side, width), model.blocks[0]
    attention = block.attn
    assert isinstance(attention, nn.Module)

    def run(module: nn.Module, *inputs: torch.Tensor) -> None:
        with computing_in(PRECISION, CPU):
            out = module(*inputs)
        out.backward(upstream.to(out.dtype))

    return {
        f"{kind} attention": lambda: run(attention, x),
        f"{kind} block": lambda: run(block, x, cond),
    }


def block_shares(attention: list[float], block: list[float]) -> dict[str, float]:
    """Returns median seconds of attention and block, and the median of attention's time over the rest's."""
    whole = summary(block, attention)
    ratio = summary([b - a for a, b in zip(attention, block, strict=True)], attention)["times_as_fast"]
    return {
        "attention_s": summary(attention, block)["median_s"],
        "block_s": whole["median_s"],
        "attention_over_rest": ratio,
    }


def memory_bytes(key: str) -> int:
    """Returns what the kernel counts of this process: `VmRSS` now, `VmHWM` at most."""
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
    return 1024 * int(status.partition(f"{key}:")[2].split()[0])


def main() -> None:
    """Prints by how many bytes this process grows: `attention_timing SIDE BATCH KIND`."""
    side, batch, kind = sys.argv[1:]
    torch.set_num_threads(1)
    register_convolution()
    before = memory_bytes("VmRSS")
    _, step = forward_and_step(replace(SIZES[int(side)], batch=int(batch)), kind)
    for _ in range(2):
        step()
    print(memory_bytes("VmHWM") - before)


if __name__ == "__main__":
    main()
