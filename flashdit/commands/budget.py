"""What a run costs, by the formulas that `flashdit estimate --help` prints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from rich.table import Column, Table

from flashdit.config import DEFAULT_CONFIG, RunConfig, check_run_config, open_sizes, with_sizes_of_data
from flashdit.data.sources import DATASETS, companions_of
from flashdit.models.costs import Activations
from flashdit.models.dit import FlashDiT
from flashdit.shared.registry import Buildable
from flashdit.shared.settings import read_settings
from flashdit.training.options import TrainingOptions, share_of_batch

NOT_READ = "not read"  # the path of data that need not be there
IMAGENET_IMAGES = 1_281_167  # of its training split


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model."""

    all: int
    trained: int
    block: int
    """Of one block."""
    outside: int
    """Of what is in no block."""


def count_parameters(config: RunConfig) -> Counts:
    """Returns the parameters of the configured model."""
    with torch.device("meta"):
        model = FlashDiT(**config.model_arguments)
    total, blocks = (sum(p.numel() for p in part.parameters()) for part in (model, model.blocks))
    return Counts(
        all=total,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        block=blocks // len(model.blocks),
        outside=total - blocks,
    )


def memory_bytes(
    config: RunConfig, counts: Counts, saved: Activations, gpus: int, sharded: bool
) -> dict[str, float]:
    """Returns the bytes of one GPU by what they hold, by the formulas of `flashdit estimate --help`.

    Args:
        config: Of the run.
        counts: Its model's parameters.
        saved: What a forward pass keeps.
        gpus: How many share the batch.
        sharded: Whether by FSDP2, else by DDP.
    """
    training, shards = config.training, gpus if sharded else 1
    images = share_of_batch(training, gpus)
    width = 4 if training.precision == "fp32" else 2
    accumulated = sharded and training.accumulation > 1
    rows: dict[str, float] = {
        "weights": 4 * counts.all / shards,
        "EMA": 4 * counts.all * (1 + len(config.ema.power_widths)) / shards,
        "AdamW": 8 * counts.trained / shards,
        "gradients": 4 * counts.trained / (1 if accumulated else shards),
        "DDP's buckets": 0 if sharded or gpus == 1 else 4 * counts.trained,
        "gathered": width * (counts.outside + 2 * counts.block) + 4 * counts.block if sharded else 0,
        "low-precision weights": 0 if sharded else saved.fixed,  # sharded, they are what is gathered
        "activations": images * saved.per_image,
    }
    return rows | {"sum": sum(rows.values())}


def kept_checkpoints(training: TrainingOptions) -> int:
    """Returns how many checkpoints lie on the disk when the run has ended."""
    saved = sorted({*range(training.save_every, training.steps + 1, training.save_every), training.steps})
    if training.keep_last is None:
        return len(saved)
    older = saved[: -training.keep_last]
    every = training.keep_every
    return len(saved) - len(older) + sum(every is not None and step % every == 0 for step in older)


def checkpoint_bytes(config: RunConfig, counts: Counts) -> float:
    """Returns the bytes of one checkpoint."""
    return 4 * counts.all * (2 + len(config.ema.power_widths)) + 8 * counts.trained


def snapshot_bytes(config: RunConfig, counts: Counts) -> float:
    """Returns the bytes of all snapshots of the power-function averages."""
    ema = config.ema
    return 4 * counts.all * len(ema.power_widths) * (config.training.steps // ema.snapshot_every)


def train_seconds(flops: float, images: int, gpus: int, peak_tflops: float, mfu: float) -> float:
    """Returns the time of so many images.

    Args:
        flops: Of one image, forward and backward.
        images: To train on.
        gpus: That share the work.
        peak_tflops: Of one GPU.
        mfu: Share of the peak that is reached.
    """
    return images * flops / (gpus * peak_tflops * 1e12 * mfu)


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it."""
    for name, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "under a second"


def read_config(path: Path | str | None, overrides: Sequence[str]) -> RunConfig:
    """Returns the checked configuration, None as for training.

    The data need not be there, unless sizes of the model are null: those are read from it.
    """
    config = read_settings(path or DEFAULT_CONFIG, overrides, RunConfig)
    if "name" in config.data:
        options_type = cast(Buildable, DATASETS[config.data["name"]]).options_type
        if "path" in {option.name for option in fields(options_type)}:
            config.data.setdefault("path", NOT_READ)
    check_run_config(config)
    if config.data.get("path") == NOT_READ and open_sizes(config):
        raise ValueError(f"model.{open_sizes(config)[0]}=null is read from the data: give data.path")
    return with_sizes_of_data(config)


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
