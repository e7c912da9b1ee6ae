"""Fused attention + depthwise convolution beside PyTorch's operators: `python -m benchmarks.kernels`.

Needs a CUDA device. Every way runs from a CUDA graph, so that launches cost none of them anything, and is
held against the time that its inputs and outputs alone take at the copy bandwidth measured in the same run.
The projection that stands between attention and convolution in a model is left out; what it would read and
write is counted as attention's output and as the map that the convolution is added to.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side import interleaved, machine, save, summary
from flashdit.shared.command import run_script
from iwin_core import kernels
from iwin_core.kernels import eager

WAYS = ("fused", "eager", "compiled eager")
MAPS_MOVED = {"forward": 7, "forward + backward": 17}
"""Maps (b, h, w, c) that must be read or written. Forward: q, k, v → out; map, out → sum. Backward: q, k, v
and the gradient → three gradients; map and gradient → gradient."""
COPY_BYTES = 2**30
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Step = Callable[[], Any]


class Problem:
    """One shape: the tensors, and the computation in each way.

    Args:
        side: Rows and columns of the map.
        arguments: Batch, width, heads, window, kernel and dtype.
    """

    def __init__(self, side: int, arguments: argparse.Namespace):
        torch.manual_seed(0)
        batch, width, kernel = arguments.batch, arguments.width, arguments.kernel
        device, dtype = arguments.device, DTYPES[arguments.dtype]

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

        self.heads, self.window = arguments.heads, (min(arguments.window, side),) * 2
        self.qkv, self.x = draw(batch, side, side, 3 * width), draw(batch, side, side, width)
        self.weight, self.bias = draw(width, 1, kernel, kernel), draw(width)
        self.upstream = torch.randn_like(self.x)
        self.inputs = (self.qkv, self.x, self.weight, self.bias)
        self.map_bytes = self.x.nbytes

    def output_by(self, form: ModuleType) -> Tensor:
        """Returns attention plus convolution by the functions of a module."""
        attended = form.window_attention(self.qkv, self.heads, self.window)
        return form.depthwise_conv(self.x, self.weight, self.bias, attended)

    def step(self, way: str, backward: bool) -> Step:
        """Returns what is timed."""
        form = kernels if way == "fused" else eager
        output = torch.compile(self.output_by, dynamic=False) if way == "compiled eager" else self.output_by

        def forward() -> Tensor:
            with torch.no_grad():
                return output(form)

        def forward_and_backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(output(form), self.inputs, self.upstream)

        return forward_and_backward if backward else forward

    def check(self) -> None:
        """Compares the fused way with the eager one before anything is timed."""
        for backward in (False, True):
            fused, plain = (self.step(way, backward)() for way in ("fused", "eager"))
            pairs = zip(fused, plain, strict=True) if backward else [(fused, plain)]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=0.1 * theirs.std().item())


def captured(step: Step, repeats: int) -> Step:
    """Returns a function that replays the step from a CUDA graph, `repeats` times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compile and choose algorithms before the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run() -> None:
        for _ in range(repeats):
            graph.replay()

    return run


def copy_step() -> Step:
    """Returns a copy that reads and writes COPY_BYTES."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(side: int, direction: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Returns the summary of every way at one shape, with its time over the bandwidth bound."""
    problem = Problem(side, arguments)
    problem.check()
    steps = {way: problem.step(way, direction != "forward") for way in WAYS} | {"copy": copy_step()}
    runs = {way: captured(step, arguments.repeats) for way, step in steps.items()}
    seconds = interleaved(runs, arguments.rounds, f"{side}² {direction}")
    per_step = {way: [total / arguments.repeats for total in times] for way, times in seconds.items()}
    rows = {way: summary(times, per_step["compiled eager"]) for way, times in per_step.items()}
    bandwidth = 2 * COPY_BYTES / rows.pop("copy")["median_s"]
    bound_s = MAPS_MOVED[direction] * problem.map_bytes / bandwidth
    extra = {"bound_s": bound_s, "copy_bytes_per_s": bandwidth}
    return {way: row | extra | {"times_the_bound": row["median_s"] / bound_s} for way, row in rows.items()}


def main() -> None:
    """Times the ways in turn at every shape and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, nargs="+", default=[16, 32, 64], help="sides of the map")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=20, help="steps in a timed run")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise ValueError("the kernels' benchmark needs a CUDA device, got none")
    arguments.device = "cuda"
    about = machine() | vars(arguments)
    results = {
        f"{side}² {direction}": measure(side, direction, arguments)
        for side in arguments.latents
        for direction in MAPS_MOVED
    }
    write(results, about, arguments)


def write(results: dict[str, dict], about: dict, arguments: argparse.Namespace) -> None:
    """Writes the JSON and the Markdown table."""
    bandwidth = min(row["copy_bytes_per_s"] for rows in results.values() for row in rows.values())
    lines = [
        f"window {arguments.window}, kernel {arguments.kernel}, batch {arguments.batch}, width "
        f"{arguments.width}, {arguments.heads} heads, {arguments.dtype}, {about['gpu']} "
        f"(copy {bandwidth / 1e12:.2f} TB/s), load {about['load_before']:.1f} before; medians of "
        f"{arguments.rounds} interleaved rounds of {arguments.repeats} steps",
        "",
        "| map, direction | way | ms | spread | times as fast as compiled | time over the bandwidth bound |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for shape, rows in results.items():
        for way, row in rows.items():
            spread = f"{row['min_s'] * 1e3:.3f}–{row['max_s'] * 1e3:.3f}"
            ratios = f"{row['times_as_fast']:.2f} | {row['times_the_bound']:.2f}"
            lines.append(f"| {shape} | {way} | {row['median_s'] * 1e3:.3f} | {spread} | {ratios} |")
    name = f"kernels_{arguments.dtype}_{arguments.width}"
    save(name, {"about": about, "shapes": results}, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_script(main)
