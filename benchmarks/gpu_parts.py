"""Parts of `make gpu`: window attention by every way, sampling by CUDA graphs, features beside the CPU's.

`python -m benchmarks.gpu_parts attention | sampling | features` prints JSON. `--device cpu --quick` tries the
code itself on small sizes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.evaluation import random_inception
from benchmarks.side_by_side import interleaved
from flashdit.models.dit import FlashDiT
from flashdit.shared.command import add_device, resolve_device, run_script
from flashdit.shared.process import full_float32
from iwin_core import kernels, partition
from iwin_core.kernels import eager
from iwin_core.kernels.cpu_attention import by_products

Run = Callable[[], object]
WINDOW = 4
FLAVOURS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def milliseconds(runs: dict[str, Run], rounds: int, label: str) -> dict[str, float]:
    """Returns the median of each run, all taken in turn."""
    seconds = interleaved(runs, rounds, label)
    return {name: round(1e3 * statistics.median(taken), 4) for name, taken in seconds.items()}


def attention(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns milliseconds of attention in interleaved 4×4 windows by every way that runs here.

    From q, k, v as the projection leaves them to the map that the next projection takes, XL's heads.
    """
    side, batch, heads, width = (8, 1, 2, 16) if arguments.quick else (16, 64, 16, 72)
    device, dtype = torch.device(arguments.device), torch.bfloat16
    qkv = torch.randn(batch, side, side, 3 * heads * width, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(batch, side, side, heads * width, device=device, dtype=dtype)
    windows = partition(qkv.detach(), (WINDOW, WINDOW)).requires_grad_()
    inside = torch.randn(len(windows), heads, WINDOW**2, width, device=device, dtype=dtype)

    def flavour(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            q, k, v = windows.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    def products() -> Tensor:
        return by_products(*windows.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4))

    ways: dict[str, tuple[Callable[[], Tensor], Tensor, Tensor]] = {
        f"inside windows: {name}": (flavour(backend), windows, inside) for name, backend in FLAVOURS.items()
    }
    ways["inside windows: two products and a softmax"] = products, windows, inside
    window = (WINDOW, WINDOW)
    ways["map to map: eager code"] = lambda: eager.window_attention(qkv, heads, window), qkv, upstream
    if device.type == "cuda":
        ways["map to map: Triton kernel"] = (
            lambda: kernels.window_attention(qkv, heads, window),
            qkv,
            upstream,
        )
    if importlib.util.find_spec("natten") is not None:
        natten = importlib.import_module("natten")
        dilation = side // WINDOW

        def neighbourhood() -> Tensor:
            q, k, v = qkv.unflatten(-1, (3, heads, width)).unbind(-3)
            return natten.na2d(q, k, v, kernel_size=WINDOW, dilation=dilation).flatten(-2)

        ways["map to map: natten, dilated"] = neighbourhood, qkv, upstream
    found: dict[str, Any] = {"refused": {}}
    for direction in ("forward", "forward + backward"):
        runs: dict[str, Run] = {}
        for name, (way, source, gradient) in ways.items():
            run = step_of(way, source, gradient, direction != "forward")
            try:
                run()
            except RuntimeError as error:  # this flavour takes no such shape here
                found["refused"][f"{direction}: {name}"] = str(error).splitlines()[0]
                continue
            runs[name] = run
        found[direction] = milliseconds(runs, arguments.rounds, direction)
    return found


def step_of(way: Callable[[], Tensor], source: Tensor, gradient: Tensor, backward: bool) -> Run:
    """Returns what is timed of a way: its output alone, or the gradient of its input too."""

    def forward() -> Tensor:
        with torch.no_grad():
            return way()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(way(), source, gradient)

    return both if backward else forward


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns milliseconds of one guided evaluation of FlashDiT: eager, compiled, and by CUDA graphs."""
    device = torch.device(arguments.device)
    size, batch = ("nano", 2) if arguments.quick else ("XL", 32)
    with device:
        model = FlashDiT.from_size(size).eval()
        x, t = torch.randn(2 * batch, 32, 16, 16), torch.rand(2 * batch)
        y = torch.randint(1000, (2 * batch,))
    ways = {"eager": model, "compiled": torch.compile(model, dynamic=False)}
    if device.type == "cuda":
        ways["compiled, CUDA graphs"] = torch.compile(model, mode="reduce-overhead", dynamic=False)

    def evaluation(network: Callable[..., Tensor]) -> Run:
        def run() -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                network(x, t, y).clone()

        return run

    runs = {name: evaluation(network) for name, network in ways.items()}
    return {
        "size": size,
        "images": batch,
        "guided evaluation, ms": milliseconds(runs, arguments.rounds, size),
    }


def features(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns how Inception's features on the device differ from the CPU's, and images a second.

    Raises:
        AssertionError: If they differ by more than 1e-3 of the largest.
    """
    count = 2 if arguments.quick else 32
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 64, 64), generator=draws, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, full_float32():
        extractor = random_inception(Path(folder))
        expected = extractor(images)
        extractor, images = extractor.to(arguments.device), images.to(arguments.device)
        found = extractor(images)
        started = time.perf_counter()
        extractor(images)["logits"].cpu()
        speed = count / (time.perf_counter() - started)
    differences = {}
    for name, wanted in expected.items():
        if wanted is not None:
            error = (found[name].cpu() - wanted).abs().max() / wanted.abs().max()
            differences[name] = error.item()
    assert max(differences.values()) <= 1e-3, differences
    return {"largest difference over the largest value": differences, "images per second": speed}


def main() -> None:
    """Makes one part and prints its record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parts = {"attention": attention, "sampling": sampling, "features": features}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    add_device(parser)
    arguments = parser.parse_args()
    arguments.device = resolve_device(arguments.device)
    print(json.dumps(parts[arguments.part](arguments), indent=1))


if __name__ == "__main__":
    run_script(main)
