"""Iwin-T and -S beside timm's Swin, ConvNeXt and MaxViT: `python -m benchmarks.backbones`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import iwin_core  # noqa: F401 - registers the Iwin entry points
from benchmarks.side_by_side import interleaved, machine, save, summary
from flashdit.shared.process import keep_freed_memory

MODELS = {
    "Iwin-T": ("iwin_tiny_patch4_window7_224", "iwin_tiny_patch4_window12_384"),
    "Swin-T": ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
    "ConvNeXt-T": ("convnext_tiny", "convnext_tiny"),
    "MaxViT-T": ("maxvit_tiny_tf_224", "maxvit_tiny_tf_384"),
    "Iwin-S": ("iwin_small_patch4_window7_224", "iwin_small_patch4_window12_384"),
    "Swin-S": ("swin_small_patch4_window7_224", "swin_small_patch4_window7_224"),
    "ConvNeXt-S": ("convnext_small", "convnext_small"),
}
BASELINES = {"T": "Swin-T", "S": "Swin-S"}


def make_model(name: str, size: int) -> nn.Module:
    """Returns a model of the table, random weights; at 384 Swin takes window 12 as Iwin does."""
    entry = MODELS[name][size == 384]
    options: dict[str, Any] = {}
    if entry.startswith("swin_") and size == 384:
        options = {"img_size": size, "window_size": 12}
    torch.manual_seed(0)
    return timm.create_model(entry, **options)


def make_run(
    name: str, size: int, batch: int, backward: bool, dtype: str, compiled: bool
) -> Callable[[], object]:
    """Returns what is timed: a forward in inference mode, or forward and backward in training mode."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")
    model = make_model(name, size).train(backward)
    network = torch.compile(model) if compiled else model
    images = torch.randn(batch, 3, size, size)

    def forward() -> None:
        with torch.inference_mode(), autocast:
            network(images)

    def forward_and_backward() -> None:
        model.zero_grad()
        with autocast:
            out = network(images)
        out.sum().backward()

    return forward_and_backward if backward else forward


def peak_memory_mib(name: str, arguments: argparse.Namespace) -> float:
    """Returns the peak resident memory of a fresh process that runs the model once."""
    command = [sys.executable, "-m", "benchmarks.backbones", "--memory-of", name, "--models", name]
    options = ["--size", str(arguments.size), "--batch", str(arguments.batch)]
    options += ["--dtype", arguments.dtype, *(["--backward"] if arguments.backward else [])]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Times the models in turn and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--size", type=int, choices=(224, 384), default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backward", action="store_true", help="time forward and backward")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="or autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--memory-of", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.size, arguments.batch, arguments.backward, arguments.dtype)
    if arguments.memory_of:
        make_run(arguments.memory_of, *shape, compiled=False)()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's memory too
        print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        return
    about = machine() | vars(arguments) | {"memory_kept": keep_freed_memory()}
    runs = {name: make_run(name, *shape, arguments.compile) for name in arguments.models}
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    seconds = interleaved(runs, arguments.rounds, "backbones", clock)
    write(seconds, about, arguments)


def write(seconds: dict[str, list[float]], about: dict, arguments: argparse.Namespace) -> None:
    """Writes the JSON and the Markdown table."""
    kind = "forward + backward" if arguments.backward else "forward"
    how = "compiled" if arguments.compile else "eager"
    clock = "processor" if arguments.threads == 1 else "wall"
    kept = "freed memory is kept" if about["memory_kept"] else "freed memory goes back to the system"
    lines = [
        f"{kind}, {how}, {arguments.size} px, batch {arguments.batch}, {arguments.dtype}, {about['threads']} "
        f"thread(s) of {about['processor']}, {kept}, load {about['load_before']:.1f} before; "
        f"{clock} time, medians of {arguments.rounds} interleaved rounds",
        "",
        "| model | images/s | times as fast as Swin | spread | peak memory (eager) |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = {}
    for name, times in seconds.items():
        baseline = seconds.get(BASELINES[name[-1]], times)
        row = summary(times, baseline) | {"peak_memory_mib": peak_memory_mib(name, arguments)}
        rows[name] = row
        speed = arguments.batch / row["median_s"]
        spread = f"{arguments.batch / row['max_s']:.1f}–{arguments.batch / row['min_s']:.1f}"
        memory = f"{row['peak_memory_mib']:,.0f} MiB"
        lines.append(f"| {name} | {speed:.1f} | {row['times_as_fast']:.3f} | {spread} | {memory} |")
    direction = "train" if arguments.backward else "forward"
    content = {"about": about, "models": rows}
    low = "" if arguments.dtype == "float32" else f"_{arguments.dtype}"
    save(f"backbones_{direction}_{how}_{arguments.size}{low}", content, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
