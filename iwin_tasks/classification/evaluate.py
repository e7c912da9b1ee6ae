"""Top-1, top-5 and throughput of a classifier on held-out images, over any number of processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashdit.shared.progress import progress_bar
from flashdit.shared.readers import read_batches
from iwin_tasks.classification.data import HeldOutExamples

TOP = 5


class Accuracy(NamedTuple):
    """What an evaluation found; `_asdict()` is what is written down."""

    top1: float
    """Share of images whose largest logit is their label's."""
    top5: float | None
    """Share of images whose label is among the five largest logits; None where no more classes are."""
    images_per_s: float
    """Images of all processes by the time that reading and the forward pass took."""
    num_images: int

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f"top-5 {self.top5:.2%}  "
        return f"top-1 {self.top1:.2%}  {top5}{self.num_images:,} images  {self.images_per_s:,.0f} images/s"

    def scores(self) -> dict[str, float]:
        """Returns what a run records."""
        found = {"ema_top1": self.top1, "ema_top5": self.top5}
        return {name: share for name, share in found.items() if share is not None}


@torch.inference_mode()
def count_correct(
    model: nn.Module,
    data: HeldOutExamples,
    rows: range,
    batch_size: int,
    device: torch.device | str = "cpu",
    workers: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    show: bool = True,
) -> Tensor:
    """Returns how many of some rows are right at once, right among the top, and there at all: (3,) int64.

    Args:
        model: In evaluation mode, on the device.
        data: The held-out images.
        rows: Which of them; only one batch is held at a time.
        batch_size: Images per forward pass; changes no count.
        device: Where the model is.
        workers: Processes that read images.
        autocast: Precision of the forward pass.
        show: Whether there is a progress bar.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    read = read_batches(
        data,
        workers,
        batch_sampler=batches,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),  # its own: the global one stays where a resume would find it
    )
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for images, labels in progress_bar(
        read, total=len(batches), desc="evaluate", unit="batch", disable=not show, leave=False
    ):
        with autocast():
            logits = model(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        ranked = logits.float().topk(min(TOP, logits.shape[1])).indices  # (b, top)
        right = ranked == labels[:, None]
        counts += torch.stack([right[:, 0].sum(), right.sum(), torch.tensor(len(labels), device=device)])
    return counts


def evaluate_classifier(
    model: nn.Module,
    data: HeldOutExamples,
    batch_size: int,
    device: torch.device | str = "cpu",
    accelerator: Any = None,
    workers: int = 0,
) -> Accuracy:
    """Returns a classifier's accuracy; with many processes each takes every so-manyth row, none twice.

    Args:
        model: On the device; evaluated in evaluation mode and given back in the mode it came.
        data: The held-out images.
        batch_size: Images per forward pass of one process; changes no accuracy.
        device: Where the model is.
        accelerator: Whose processes share the work, whose precision is used; None means this process alone.
        workers: Processes that read images, for each evaluating process.

    Raises:
        ValueError: If an image cannot be read.
    """
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    autocast = accelerator.autocast if accelerator else nullcontext
    rows = range(rank, len(data), ranks)
    was_training = model.training
    started = time.perf_counter()
    counts = count_correct(model.eval(), data, rows, batch_size, device, workers, autocast, show=rank == 0)
    if accelerator:
        counts = accelerator.reduce(counts, "sum")
    top1, top5, num_images = counts.tolist()
    elapsed_s = time.perf_counter() - started
    model.train(was_training)
    return Accuracy(
        top1=top1 / num_images,
        top5=top5 / num_images if len(data.images.class_names) > TOP else None,
        images_per_s=num_images / elapsed_s,
        num_images=int(num_images),
    )
