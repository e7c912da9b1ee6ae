"""What a run costs, by the formulas that `flashdit estimate --help` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import torch
from rich.table import Column, Table

from flashdit.config import (
    DEFAULT_CONFIG,
    RunConfig,
    check_run_config,
    facts_of_data,
    open_sizes,
    with_sizes,
)
from flashdit.data.fit import DataFacts, check_fit
from flashdit.data.latents import LatentSpace
from flashdit.data.sources import DATASETS
from flashdit.flow.mean_flow import COST
from flashdit.memory import Counts, memory_bytes, model_without_memory, optimizer_bytes
from flashdit.models.attention import describe_attention
from flashdit.models.costs import Activations, forward_flops, of_one_block
from flashdit.models.dit import default_arguments
from flashdit.shared.command import resolve_device
from flashdit.shared.process import AUTOCAST, float32_products
from flashdit.shared.registry import Buildable, counted
from flashdit.shared.settings import read_settings
from flashdit.teachers.alignment import open_alignment
from flashdit.teachers.distillation import teacher_arguments
from flashdit.training.meter import matmul_peak
from flashdit.training.options import TrainingOptions, share_of_batch

NOT_READ = "not read"  # the path of data that need not be there
IMAGENET_IMAGES = 1_281_167  # of its training split
MFU = {"cpu": 0.2, "cuda": 0.4}  # assumed of a kind of device
H100_TFLOPS = 989.0  # in bf16


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run is made on."""

    devices: int = 8
    """How many share the batch."""
    peak_tflops: float = H100_TFLOPS
    """Of one device."""
    mfu: float = MFU["cuda"]
    """Share of the peak that is reached."""
    measured: str | None = None
    """The device whose peak was measured; None where it is assumed."""

    def describe(self) -> str:
        """Returns in words what the times rest on."""
        if self.measured is None:
            return f"{self.mfu:.0%} of {self.peak_tflops:g} TFLOP/s on each GPU"
        peak = f"{self.peak_tflops:.3g} TFLOP/s that a matrix product was measured to reach"
        return f"{self.mfu:.0%} of the {peak} on this machine's {self.measured}"


def this_machine(training: TrainingOptions, mfu: float | None = None) -> Machine:
    """Returns one device of this machine, its peak measured in the run's precision.

    Args:
        training: Of the run.
        mfu: Share of the peak that is reached; None assumes one that suits the kind of device.
    """
    device = torch.device(resolve_device(None))
    with float32_products(tf32=training.tf32):
        peak = matmul_peak(device, AUTOCAST[training.precision] or torch.float32)
    share = MFU[device.type] if mfu is None else mfu
    return Machine(devices=1, peak_tflops=peak / 1e12, mfu=share, measured=device.type)


def kept_checkpoints(training: TrainingOptions) -> int:
    """Returns how many checkpoints lie on the disk when the run has ended."""
    steps, save_every = training.steps, training.save_every
    saved = -(-steps // save_every)  # the last step is one of them
    if training.keep_last is None or training.keep_last >= saved:
        return saved
    if training.keep_every is None:
        return training.keep_last
    older = (saved - training.keep_last) * save_every  # the newest step that is not among the last
    return training.keep_last + older // math.lcm(save_every, training.keep_every)


def checkpoint_bytes(config: RunConfig, counts: Counts) -> float:
    """Returns the bytes of one checkpoint."""
    own = 4 * counts.all * (2 + len(config.ema.power_widths)) + optimizer_bytes(config, counts)
    return own + 12 * counts.projector  # with AdamW's two moments


def snapshot_bytes(config: RunConfig, counts: Counts) -> float:
    """Returns the bytes of all snapshots of the power-function averages."""
    ema = config.ema
    return 4 * counts.all * len(ema.power_widths) * (config.training.steps // ema.snapshot_every)


def train_flops(config: RunConfig, multiply_adds: float) -> float:
    """Returns the FLOPs of training on one image, of whose forward pass the multiply-adds are given."""
    again = config.training.gradient_checkpointing and not config.training.keep_matmuls
    own = 6 * multiply_adds * (4 / 3 if again else 1) * (COST if config.flow.mean_flow.enabled else 1)
    projected, features = alignment_flops(config)
    return own + teacher_flops(config) + 3 * projected + features


def teacher_flops(config: RunConfig) -> float:
    """Returns the FLOPs of the teacher's forward pass of one image, 0 without a teacher."""
    source = config.distillation.teacher
    return 0.0 if source is None else forward_flops(teacher_arguments(source))


def alignment_flops(config: RunConfig) -> tuple[float, float]:
    """Returns the FLOPs of one image's tokens through the projector, and of its features; 0 and 0 without.

    Raises:
        ValueError: If the extractor cannot be had, or there is nothing to decode latents in a folder with.
    """
    if config.alignment.extractor is None:
        return 0.0, 0.0
    model = model_without_memory(of_one_block(config.model_arguments))
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    space = LatentSpace(zero, one, config.latents, config.latents.autoencoder())
    reads_images = DATASETS[config.data["name"]].build is not DATASETS["shards"].build
    place = reads_images, torch.device("cpu"), nullcontext, config.seed
    alignment = open_alignment(config.alignment, model, space, *place)
    return alignment.projector_flops(), alignment.frozen_flops()


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
    """Returns the checked configuration, None as for training; the data need not be named."""
    config = read_settings(path or DEFAULT_CONFIG, overrides, RunConfig)
    if "name" in config.data:
        options_type = cast(Buildable, DATASETS[config.data["name"]]).options_type
        if "path" in {option.name for option in fields(options_type)}:
            config.data.setdefault("path", NOT_READ)
    check_run_config(config)
    return config


def with_data(config: RunConfig) -> tuple[RunConfig, DataFacts | None]:
    """Returns the configuration with the sizes that the data have, and the data; None if they are not there.

    Raises:
        ValueError: If the data cannot be read, model and data do not fit together as training requires, or a
            size of the model is null and the data are not there.
    """
    path = config.data.get("path")
    if path is not None and not Path(path).exists():
        if open_sizes(config):
            got = "" if path == NOT_READ else f", got {path}, and there is no such path"
            raise ValueError(f"model.{open_sizes(config)[0]}=null is read from the data: give data.path{got}")
        return config, None
    data = facts_of_data(config)
    config = with_sizes(config, data)
    check_fit(model_without_memory(of_one_block(config.model_arguments)).config, data, data.vae)
    return config, data


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
    config: RunConfig,
    counts: Counts,
    multiply_adds: float,
    machine: Machine,
    data: DataFacts | None,
    images: int | None = None,
) -> dict[str, str]:
    """Returns what holds whatever the strategy, name → text: the model, its time and its disk space.

    Args:
        config: Of the run.
        counts: Its model's parameters.
        multiply_adds: Of a forward pass of one image.
        machine: That it is made on.
        data: What it is trained on; None where that is not there.
        images: Of an epoch; None: those of the data, or as many as ImageNet's.
    """
    training, devices = config.training, machine.devices
    arguments = default_arguments() | config.model_arguments
    epoch = images or (IMAGENET_IMAGES if data is None else len(data.labels))
    run = training.steps * training.global_batch_size
    flops = train_flops(config, multiply_adds)
    rates = machine.devices, machine.peak_tflops, machine.mfu
    epoch_s, run_s = (train_seconds(flops, count, *rates) for count in (epoch, run))
    shares = f"{devices} × {training.accumulation} × {share_of_batch(training, devices)}"
    kept, one = kept_checkpoints(training), checkpoint_bytes(config, counts)
    prefixes = ("", "k", "M", "G", "T", "P", "E")
    whose = " images of ImageNet, assumed" if data is None and images is None else ""
    lines = {
        "data": describe_data(data),
        "attention": describe_attention(arguments["attention"], arguments["depth"])
        + (f", {arguments['registers']} registers" if arguments["registers"] else ""),
        "parameters": f"{counts.all:,}",
        "multiply-adds": f"{scaled(multiply_adds, 1000, prefixes)} a forward pass of one image",
        "FLOPs": f"{scaled(flops * training.global_batch_size, 1000, prefixes)} a step",
        "batch": f"{counted(training.global_batch_size, 'image')} = {shares} (devices × accumulated × each)",
        "length": f"{counted(training.steps, 'step')} = {counted(run, 'image')} = {run / epoch:.1f} epochs "
        f"of {epoch:,}{whose}",
        "assumed": machine.describe(),
        "time then": f"{duration(epoch_s)} an epoch, {duration(run_s)} in all",
        **({} if machine.measured else {"GPU hours": f"{run_s * devices / 3600:,.1f}"}),
        "checkpoints": f"{kept} kept × {size(one)} = {size(kept * one)}",
    }
    if config.distillation.teacher is not None:
        once = scaled(teacher_flops(config) / 2, 1000, prefixes)
        lines["teacher"] = f"{counts.teacher:,} frozen parameters, {once} multiply-adds an image"
    if config.alignment.extractor is not None:
        projected, features = (scaled(flops / 2, 1000, prefixes) for flops in alignment_flops(config))
        lines["projector"] = f"{counts.projector:,} parameters, {projected} multiply-adds an image"
        lines["extractor"] = f"{counts.extractor:,} frozen parameters, {features} multiply-adds an image"
    if config.ema.power_widths:
        lines["snapshots"] = f"{size(snapshot_bytes(config, counts))} of the power-function averages"
    return lines


def describe_data(data: DataFacts | None) -> str:
    """Returns in words what the data are."""
    if data is None:
        return "data not read: what training checks of them is not checked"
    images, classes = counted(len(data.labels), "image"), counted(data.num_classes, "class", "classes")
    return f"{images}, {classes}, {' × '.join(map(str, data.shape))} numbers each; the model fits them"


def memory_table(
    config: RunConfig, counts: Counts, ways: Mapping[str, Activations], gpus: int, sharded: bool
) -> Table:
    """Returns the memory of one GPU: a row for what it holds, a column for each way of `activations`."""
    columns = {way: memory_bytes(config, counts, saved, gpus, sharded) for way, saved in ways.items()}
    name = "FSDP2" if sharded else "DDP" if gpus > 1 else "one device"
    table = Table(f"{name}: each holds", *(Column(way, justify="right") for way in columns))
    for row in next(iter(columns.values())):
        cells = [column[row] for column in columns.values()]
        if any(cells):
            texts = (size(cell) if cell else "" for cell in cells)
            table.add_row(row, *texts, style="bold" if row == "sum" else None)
    return table
