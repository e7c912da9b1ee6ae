"""`flashdit estimate --config YAML`: what a run will cost, before anyone pays for it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.table import Column, Table

from flashdit.commands import budget
from flashdit.commands.budget import (
    Counts,
    checkpoint_bytes,
    count_parameters,
    kept_checkpoints,
    memory_bytes,
    snapshot_bytes,
    train_seconds,
)
from flashdit.config import DEFAULT, RunConfig, check
from flashdit.data.sources import DATASETS, companions_of
from flashdit.models.costs import Activations, activations, forward_flops
from flashdit.shared.command import run_script
from flashdit.shared.registry import Buildable
from flashdit.shared.settings import read
from flashdit.training.loop import share_of_batch

IMAGENET_IMAGES = 1_281_167  # of its training split


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    for name, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "under a second"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = argparse.ArgumentParser(
        prog="flashdit estimate",
        description=budget.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, default=DEFAULT, help="YAML (default: configs/digits.yaml)")
    add("overrides", nargs="*", metavar="key=value", help="as train.py takes them; data.path may stay open")
    add("--gpus", type=int, default=8, help="how many share the batch (default: 8)")
    add("--images", type=int, help="of an epoch (default: those that the data set brings, or ImageNet's)")
    add(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="of one GPU (default: 989, an H100's or H200's in bf16)",
    )
    add(
        "--mfu",
        type=float,
        default=0.4,
        help="assumed share of that peak; metrics.jsonl says what it is (0.4)",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.gpus < 1:
        raise ValueError(f"--gpus must be at least 1, got {arguments.gpus}")
    if arguments.images is not None and arguments.images < 1:
        raise ValueError(f"--images must be at least 1, got {arguments.images}")
    if not 0 < arguments.mfu <= 1 or not 0 < arguments.peak_tflops < float("inf"):
        rule = "--mfu must be above 0 and at most 1, and --peak-tflops positive"
        raise ValueError(f"{rule}, got {arguments.mfu} and {arguments.peak_tflops}")
    return arguments


def read_config(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Returns the checked configuration; the data need not be there."""
    config = read(path, overrides, RunConfig)
    if "name" in config.data:
        options_type = cast(Buildable, DATASETS[config.data["name"]]).options_type
        if "path" in {option.name for option in fields(options_type)}:
            config.data.setdefault("path", "not read")
    check(config)
    return config


def scaled(value: float, base: int, units: Sequence[str]) -> str:
    """Returns a number with the largest unit that keeps it at 1 or above."""
    place = 0
    while value >= base and place < len(units) - 1:
        value, place = value / base, place + 1
    return f"{value:,.2f} {units[place]}"


def size(count: float) -> str:
    """Returns a number of bytes as text."""
    return scaled(count, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def facts(
    config: RunConfig, counts: Counts, multiply_adds: float, arguments: argparse.Namespace
) -> dict[str, str]:
    """Returns what holds whatever the strategy, name → text: the model, its time and its disk space."""
    training, gpus, peak, mfu = config.training, arguments.gpus, arguments.peak_tflops, arguments.mfu
    own = companions_of(config.data["name"]).floor
    epoch = arguments.images or (own().count if own else IMAGENET_IMAGES)
    run = training.steps * training.global_batch_size
    again = training.gradient_checkpointing and not training.keep_matmuls
    flops = 6 * multiply_adds * (4 / 3 if again else 1)
    epoch_s, run_s = (train_seconds(flops, images, gpus, peak, mfu) for images in (epoch, run))
    shares = f"{gpus} × {training.accumulation} × {share_of_batch(training, gpus)}"
    kept, one = kept_checkpoints(training), checkpoint_bytes(config, counts)
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    lines = {
        "parameters": f"{counts.all:,}",
        "multiply-adds": f"{scaled(multiply_adds, 1000, prefixes)} a forward pass of one image",
        "FLOPs": f"{scaled(flops * training.global_batch_size, 1000, prefixes)} a step",
        "batch": f"{training.global_batch_size:,} images = {shares} (GPUs × accumulated × each)",
        "length": f"{training.steps:,} steps = {run:,} images = {run / epoch:.1f} epochs of {epoch:,}",
        "assumed": f"{mfu:.0%} of {peak:g} TFLOP/s on each GPU",
        "time then": f"{duration(epoch_s)} an epoch, {duration(run_s)} in all",
        "GPU hours": f"{run_s * gpus / 3600:,.1f}",
        "checkpoints": f"{kept} kept × {size(one)} = {size(kept * one)}",
    }
    if config.ema.power_widths:
        lines["snapshots"] = f"{size(snapshot_bytes(config, counts))} of the power-function averages"
    return lines


def memory_table(
    config: RunConfig, counts: Counts, ways: Mapping[str, Activations], gpus: int, sharded: bool
) -> Table:
    """Returns the memory of one GPU: a row for what it holds, a column for each way of `activations`."""
    columns = {way: memory_bytes(config, counts, saved, gpus, sharded) for way, saved in ways.items()}
    name = "FSDP2" if sharded else "DDP" if gpus > 1 else "1 GPU"
    table = Table(f"{name}: each holds", *(Column(way, justify="right") for way in columns))
    for row in next(iter(columns.values())):
        cells = [column[row] for column in columns.values()]
        if any(cells):
            texts = (size(cell) if cell else "" for cell in cells)
            table.add_row(row, *texts, style="bold" if row == "sum" else None)
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the estimate."""
    arguments = parse(argv)
    config = read_config(arguments.config, arguments.overrides)
    counts, multiply_adds = count_parameters(config), forward_flops(config.model) / 2
    about = Table(show_header=False, title=str(arguments.config))
    for name, text in facts(config, counts, multiply_adds, arguments).items():
        about.add_row(name, text)
    console = Console()
    console.print(about)
    ways = activations(config.model, config.training.precision != "fp32")
    for sharded in (False, True) if arguments.gpus > 1 else (False,):
        console.print(memory_table(config, counts, ways, arguments.gpus, sharded))
    console.print(
        "recomputed: training.gradient_checkpointing=true; products kept: training.keep_matmuls=true too"
    )
    console.print("the formulas: flashdit estimate --help", style="dim")


if __name__ == "__main__":
    run_script(main)
