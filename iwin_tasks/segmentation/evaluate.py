"""Scores of a segmenter on held-out images, each counted once, over any number of processes."""

from __future__ import annotations

import time
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashdit.shared.progress import progress_bar
from flashdit.shared.readers import read_batches
from iwin_tasks.segmentation.data import HeldOutPixels
from iwin_tasks.segmentation.inference import InferenceOptions, predict_probabilities
from iwin_tasks.segmentation.metrics import ConfusionMatrix, SegmentationScores


class SegmentationResult(NamedTuple):
    """What an evaluation found."""

    scores: SegmentationScores
    num_images: int
    images_per_s: float
    """Images of all processes by the time that reading and the forward pass took."""

    def __str__(self) -> str:
        return f"{self.scores}  {self.num_images:,} images  {self.images_per_s:,.1f} images/s"

    def recorded(self) -> dict[str, float]:
        """Returns what a run records."""
        miou, mean_accuracy, pixel_accuracy, _ = self.scores
        return {"ema_miou": miou, "ema_mean_acc": mean_accuracy, "ema_pixel_acc": pixel_accuracy}


def predict_classes(
    model: nn.Module, images: Tensor, options: InferenceOptions, size: Any, accelerator: Any
) -> Tensor:
    """Returns the likeliest classes (B, *size) int64 of normalised images (B, 3, h, w), on their device.

    Args:
        model: In evaluation mode, on the images' device.
        images: As `held_out_image` gives them.
        options: Windows, scales and mirror images.
        size: Height and width of the result.
        accelerator: Whose precision is used.
    """

    def logits(x: Tensor) -> Tensor:
        with accelerator.autocast():
            return model(x)

    return predict_probabilities(logits, images, size=size, **vars(options)).argmax(1)


def evaluate_segmenter(
    model: nn.Module,
    data: HeldOutPixels,
    options: InferenceOptions,
    batch_size: int,
    num_classes: int,
    accelerator: Any,
    workers: int = 0,
) -> SegmentationResult:
    """Returns a segmenter's scores; with many processes each takes every so-manyth image, none twice.

    Args:
        model: On the accelerator's device; given back in the mode it came.
        data: The held-out images.
        options: Windows, scales and mirror images.
        batch_size: Images of one size per forward pass of one process; changes no score.
        num_classes: K.
        accelerator: Whose processes share the work, whose precision is used.
        workers: Processes that read images, for each evaluating process.

    Raises:
        ValueError: If a file cannot be read.
    """
    device, rank, ranks = accelerator.device, accelerator.process_index, accelerator.num_processes
    rows = range(rank, len(data), ranks)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    read = read_batches(
        data,
        workers,
        batch_sampler=batches,
        collate_fn=list,
        generator=torch.Generator(),  # its own: the global one stays where a resume would find it
    )
    matrix = ConfusionMatrix(num_classes, data.images.ignore, device)
    was_training, started = model.training, time.perf_counter()
    model.eval()
    for batch in progress_bar(
        read, total=len(batches), desc="evaluate", unit="batch", disable=rank != 0, leave=False
    ):
        for _, same in groupby(batch, key=lambda pair: (pair[0].shape, pair[1].shape)):
            images, labels = map(torch.stack, zip(*same, strict=True))
            found = predict_classes(model, images.to(device), options, labels.shape[-2:], accelerator)
            matrix.add(found, labels.to(device))
    model.train(was_training)
    matrix.gather(accelerator)
    elapsed_s = time.perf_counter() - started
    return SegmentationResult(matrix.scores(), len(data), len(data) / elapsed_s)
