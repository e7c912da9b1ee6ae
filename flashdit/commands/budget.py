"""What a run costs, each figure by its formula.

P parameters, N GPUs, b images of one GPU and one accumulated part:

  multiply-adds    counted by torch's FlopCounterMode on a model without memory; matrix products alone
  FLOPs            3 × 2 × multiply-adds an image, since the backward pass counts twice; × 4/3 where matrix
                   products are recomputed
  time             images × FLOPs / (N × --peak-tflops × --mfu); peak and MFU are assumed, not measured
  weights, EMA     4 P bytes each (float32), and 4 P for each of ema.power_widths
  AdamW            8 P bytes (two moments, float32)
  gradients        4 P bytes; under DDP as much again for the buckets that processes exchange
  activations      b × what autograd saves for an image, and beside them low-precision copies of the weights:
                   both read off a model of full size without memory, as it runs without torch.compile;
                   recomputed, they are the inputs of all blocks and everything of one block; and of all
                   blocks the products, where those are kept
  FSDP2            weights, EMA, AdamW and gradients / N, but gradients whole where batches are accumulated;
                   gathered: what is in no block and two blocks, at 2 bytes a parameter in bf16 and fp16 and
                   4 in fp32, and the gradients of one at 4
  checkpoint       weights + EMA + AdamW; how many are kept follows from training.steps, save_every, keep_last
                   and keep_every
  snapshots        4 P bytes for each of ema.power_widths every ema.snapshot_every steps

On one device the sum is within 10 % of the measured peak where activations outweigh gradients, and at most
the gradients above it where they do not (measured on a CPU by its tests; the shares of DDP and
FSDP2 are not measured). A GPU holds more beside it: the CUDA context, gaps of the allocator,
workspaces of kernels, a VAE for previews.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashdit.config import RunConfig
from flashdit.models.costs import Activations
from flashdit.models.dit import FlashDiT
from flashdit.training.options import TrainingOptions, share_of_batch


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
        model = FlashDiT(**config.model)
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
    """Returns the bytes of one GPU by what they hold, in the formulas above.

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
