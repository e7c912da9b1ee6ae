"""Options of the training loop, whatever it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from flashdit.shared.paths import check_length
from flashdit.shared.process import AUTO
from flashdit.shared.readers import check_workers
from flashdit.shared.registry import unknown
from flashdit.shared.seeds import check_seed
from flashdit.training.ema import EmaOptions
from flashdit.training.optim import OptimizerOptions
from flashdit.training.tracking import TrackingOptions
from iwin_core.kernels.cpu_attention import FUSED, read_table

PRECISIONS = ("fp32", "bf16", "fp16", AUTO)
MOST_IMAGES = 10**9  # of a step, whatever the parts that it is made in
LONGEST_TIMEOUT_S = 31_536_000  # a year
COMPILES = ("none", "block", "model")


@dataclass(kw_only=True)
class TrainingOptions:
    """Options of the training loop; all counts are optimiser steps.

    Raises:
        ValueError: If a count is not positive or a name is unknown.
    """

    steps: int = 80_000
    """When training ends; may grow on resume."""
    global_batch_size: int = 1024
    """Images an optimiser step sees, over all processes and accumulated batches."""
    accumulation: int = 1
    """Batches whose gradients are added up before an optimiser step."""
    precision: str = "fp32"
    """`fp32`, or `bf16` or `fp16` for the forward and backward pass alone; `auto` is bf16 where the device of
    the run's start multiplies it faster, else fp32, and stays what it was on resume."""
    cpu_attention: str = AUTO
    """The processor whose measurements decide how attention is computed on a CPU, or `fused`; `auto` is that
    of the run's start, and stays what it was on resume."""
    tf32: bool = False
    """Whether matrix products of float32 may round to TF32 on GPUs that have it."""
    compile: str = "none"
    """What torch.compile takes: `none`, each `block` (starts soonest), or the whole `model`."""
    gradient_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass to save memory."""
    keep_matmuls: bool = False
    """With it, whether FlashDiT keeps the outputs of matrix products and computes only the rest again."""
    workers: int = 0
    """Processes that read data, for each training process."""
    log_every: int = 100
    """Steps between records in metrics.jsonl, each the mean over them."""
    save_every: int = 5_000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int | None = None
    """Checkpoints kept, counted from the newest; None keeps all."""
    keep_every: int | None = None
    """Checkpoints at multiples of this are kept whatever `keep_last` says."""
    preview_every: int = 5_000
    """Steps between grids of the EMA's samples, or evaluations of a classifier; 0 makes none."""
    max_skips: int = 20
    """Steps in a row with a gradient that is not finite before the run ends."""
    timeout_s: int = 1800
    """Seconds that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, known in (("precision", PRECISIONS), ("compile", COMPILES)):
            if getattr(self, name) not in known:
                raise unknown(f"training.{name}", getattr(self, name), known)
        counts = ("steps", "global_batch_size", "accumulation", "log_every", "save_every", "max_skips")
        for name in (*counts, "timeout_s", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"training.{name} must be at least 1, got {value}")
        if self.timeout_s > LONGEST_TIMEOUT_S:
            raise ValueError(f"training.timeout_s must be at most {LONGEST_TIMEOUT_S}, got {self.timeout_s}")
        if self.global_batch_size > MOST_IMAGES:
            raise ValueError(
                f"training.global_batch_size must be at most {MOST_IMAGES}, got {self.global_batch_size}"
            )
        if self.preview_every < 0:
            raise ValueError(f"training.preview_every must not be negative, got {self.preview_every}")
        if self.cpu_attention not in (known := (AUTO, FUSED, *read_table())):
            raise unknown("training.cpu_attention", self.cpu_attention, known)
        check_workers(self.workers, "training.workers")
        if self.keep_matmuls and (not self.gradient_checkpointing or self.compile != "none"):
            raise ValueError(
                "training.keep_matmuls requires gradient_checkpointing and no compile, which does so itself, "
                f"got gradient_checkpointing={self.gradient_checkpointing} and compile={self.compile}"
            )


class LoopConfig(Protocol):
    """What the loop reads of a task's configuration; `run.dir` is the run's folder."""

    seed: int
    run: Any
    optimizer: OptimizerOptions
    ema: EmaOptions
    training: TrainingOptions
    tracking: TrackingOptions


@dataclass(kw_only=True)
class RunOptions:
    """Where a run lies."""

    dir: str = ""
    """The run's folder; the same folder resumes the run."""


def check_run(config: LoopConfig) -> None:
    """Raises ValueError for options of every run that are invalid together, or missing."""
    if not config.run.dir:
        raise ValueError("run.dir must name the run's folder: give run.dir=runs/NAME")
    check_length(config.run.dir, "run.dir")
    check_seed(config.seed, "seed")
    decay_steps, steps = config.optimizer.decay_steps, config.training.steps
    if steps * config.training.global_batch_size >= 2**63:
        raise ValueError(
            f"training.steps × training.global_batch_size must be below 2^63 images, got {steps} × "
            f"{config.training.global_batch_size}"
        )
    if decay_steps is not None and steps > decay_steps and config.optimizer.min_lr == 0:
        raise ValueError(
            "training.steps must not pass optimizer.decay_steps, where the learning rate has come to 0, "
            f"got {steps} and {decay_steps}"
        )


def share_of_batch(training: TrainingOptions, processes: int) -> int:
    """Returns the batch of one process and one accumulated part.

    Raises:
        ValueError: If the global batch cannot be shared evenly.
    """
    parts = processes * training.accumulation
    if training.global_batch_size % parts:
        raise ValueError(
            "training.global_batch_size must be a multiple of processes × accumulation, "
            f"got {training.global_batch_size} for {processes} × {training.accumulation}"
        )
    return training.global_batch_size // parts
