"""What does training hold in memory, and does the device have it? Known before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flashdit.config import RunConfig
from flashdit.models.attention import each_attention
from flashdit.models.costs import (
    RECOMPUTED,
    Activations,
    activations,
    depth_of,
    measure_parts,
    of_one_block,
)
from flashdit.models.dit import FlashDiT, default_arguments
from flashdit.models.sizes import IWIN
from flashdit.shared.process import AUTO, check_memory, device_memory
from flashdit.teachers.alignment import POOL, alignment_parameters
from flashdit.teachers.distillation import teacher_arguments
from flashdit.training.optim import MUON, linear_weights
from flashdit.training.options import share_of_batch
from iwin_core.kernels.cpu_attention import FUSED

TOLERANCE = 0.1  # of the estimate
GENEROUS = 100
"""Bytes that a block keeps for each number of a token and each unit of its MLP's ratio, at the most."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model."""

    all: int
    trained: int
    linear: int
    """Of these, the weights of linear layers in blocks, which Muon takes."""
    block: int
    """Of the largest block."""
    outside: int
    """Of what is in no block."""
    teacher: int = 0
    """Of the frozen model that teaches."""
    projector: int = 0
    """Of what maps tokens to an extractor's features, which is trained."""
    extractor: int = 0
    """Of that frozen extractor."""


def model_without_memory(arguments: Mapping[str, Any]) -> FlashDiT:
    """Returns the model of these arguments of FlashDiT, on torch's meta device.

    Raises:
        ValueError: If a tensor of it is larger than any machine could address.
    """
    try:
        with torch.device("meta"):
            return FlashDiT(**arguments)
    except (RuntimeError, TypeError, OverflowError) as error:
        specs = [
            spec for spec in each_attention(arguments.get("attention", IWIN)) if isinstance(spec, Mapping)
        ]
        attention = {f"attention.{name}": value for spec in specs for name, value in spec.items()}
        sizes = {
            name: value
            for name, value in {**arguments, **attention}.items()
            if isinstance(value, int | float) and name != "time_scale"
        }
        largest = max(sizes, key=lambda name: sizes[name])
        rule = "a model's tensors must be of sizes that a machine can address"
        raise ValueError(f"{rule}, got model.{largest}={sizes[largest]}") from error


def count_parameters(config: RunConfig) -> Counts:
    """Returns the parameters of the configured model, whose blocks of one attention kind are alike."""

    def count(arguments: dict[str, Any]) -> np.ndarray:
        model = model_without_memory(arguments)
        parameters = list(model.parameters())
        trained = [p for p in parameters if p.requires_grad]
        numbers = [
            sum(p.numel() for p in some) for some in (parameters, trained, linear_weights(model.blocks))
        ]
        return np.array(numbers, dtype=object)  # integers of any size

    parts = measure_parts(config.model_arguments, count)
    whole, trained, linear = parts.sum
    block = max(int(counts[0]) for _, counts in parts.blocks)
    source = config.distillation.teacher
    teacher = 0 if source is None else int(measure_parts(teacher_arguments(source), count).sum[0])
    projector, extractor = alignment_parameters(config.alignment, hidden_size_of(config))
    return Counts(
        all=int(whole),
        trained=int(trained),
        linear=int(linear),
        block=block,
        outside=int(parts.outside[0]),
        teacher=teacher,
        projector=projector,
        extractor=extractor,
    )


def hidden_size_of(config: RunConfig) -> int:
    """Returns the width of a run's model."""
    return (default_arguments() | config.model_arguments)["hidden_size"]


def projector_bytes(config: RunConfig, counts: Counts, images: int, gpus: int) -> float:
    """Returns the bytes of a projector: its weights, gradients, AdamW's moments, and activations of images.

    Args:
        config: Of the run.
        counts: Its parameters.
        images: Of one GPU.
        gpus: How many share the batch.
    """
    if not counts.projector:
        return 0
    options = config.alignment
    model = model_without_memory(of_one_block(config.model_arguments))
    tokens = 1 if options.features == POOL else math.prod(model.native_grid)
    width = 4 if config.training.precision == "fp32" else 2
    layers = 4 * options.width * width  # two products and what SiLU makes of them
    return 4 * counts.projector * (5 if gpus > 1 else 4) + images * tokens * layers


def optimizer_bytes(config: RunConfig, counts: Counts) -> int:
    """Returns the bytes of the optimiser's state: AdamW has two moments of a number, Muon has one."""
    return 8 * counts.trained - (4 * counts.linear if config.optimizer.name == MUON else 0)


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
        "Muon and AdamW" if config.optimizer.name == MUON else "AdamW": optimizer_bytes(config, counts)
        / shards,
        "gradients": 4 * counts.trained / (1 if accumulated else shards),
        "DDP's buckets": 0 if sharded or gpus == 1 else 4 * counts.trained,
        "gathered": width * (counts.outside + 2 * counts.block) + 4 * counts.block if sharded else 0,
        "low-precision weights": 0 if sharded else saved.fixed,  # sharded, they are what is gathered
        "teacher": 4 * counts.teacher,  # whole on each GPU
        "extractor": 4 * counts.extractor,
        "projector": projector_bytes(config, counts, images, gpus),
        "activations": images * (saved.per_image + saved.gradients),
    }
    return rows | {"sum": sum(rows.values())}


def activations_on(config: RunConfig, device: str) -> dict[str, Activations]:
    """Returns the activations of a run's training step by what is kept of the blocks.

    Args:
        config: Of the run.
        device: Kind of device, `cpu` or `cuda`: on a CPU attention is computed as the run chooses.
    """
    processor = config.training.cpu_attention if device == "cpu" else FUSED
    low_precision = config.training.precision != "fp32"
    return activations(config.model_arguments, low_precision, None if processor == AUTO else processor)


def check_step_fits(config: RunConfig, device: torch.device, processes: int, sharded: bool) -> None:
    """Refuses a model or a batch that the memory of a device cannot hold.

    Args:
        config: Of the run, its sizes known.
        device: That each of the processes trains on.
        processes: How many share the batch.
        sharded: Whether by FSDP2.

    Raises:
        ValueError: If a training step is larger; says what takes most of it.
    """
    training = config.training
    counts, one = count_parameters(config), model_without_memory(of_one_block(config.model_arguments))
    tokens = math.prod(one.native_grid) * one.config["hidden_size"] * depth_of(config.model_arguments)

    def check(saved: Activations) -> float:
        rows = memory_bytes(config, counts, saved, processes, sharded)
        needed = rows.pop("sum")
        most = max(rows, key=lambda name: rows[name])
        check_memory(needed * (1 - TOLERANCE), device, f"a training step, of which {most} take most,")
        return needed

    least = check(Activations(fixed=0.0, per_image=2.0 * tokens))  # the inputs of the blocks in two bytes
    memory = device_memory(device)
    copies = tokens * (1 + one.config["registers"])  # each window has the registers, and a token at least
    at_most = (
        least + share_of_batch(training, processes) * GENEROUS * max(4.0, one.config["mlp_ratio"]) * copies
    )
    if memory is not None and at_most > memory:
        way = RECOMPUTED[training.gradient_checkpointing + training.keep_matmuls]
        check(activations_on(config, device.type)[way])
