"""Mean IoU, mean accuracy and pixel accuracy from one confusion matrix, which all processes add to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class SegmentationScores(NamedTuple):
    """What a confusion matrix says; shares from 0 to 1."""

    miou: float
    """Mean of the classes' intersections over unions, of those that labels or predictions have."""
    mean_accuracy: float
    """Mean over the classes that labels have of the share of their pixels that is right."""
    pixel_accuracy: float
    """Share of all counted pixels that is right."""
    iou: tuple[float, ...]
    """Of each class; nan where neither labels nor predictions have it."""

    def __str__(self) -> str:
        return f"mIoU {self.miou:.2%}  mAcc {self.mean_accuracy:.2%}  aAcc {self.pixel_accuracy:.2%}"


class ConfusionMatrix:
    """Counts pixels by label (row) and prediction (column), (K, K) int64.

    Args:
        num_classes: K.
        ignore: The label of pixels that do not count.
        device: Where it counts.
    """

    def __init__(self, num_classes: int, ignore: int = 255, device: torch.device | str = "cpu"):
        self.ignore = ignore
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Counts the pixels of one or more images.

        Args:
            predictions: Classes, of any shape.
            labels: Classes or `ignore`, of the same shape.

        Raises:
            ValueError: If the shapes differ or a class is out of range.
        """
        if predictions.shape != labels.shape:
            raise ValueError(
                f"predictions and labels must have one shape, got {tuple(predictions.shape)} and "
                f"{tuple(labels.shape)}"
            )
        counted = labels != self.ignore
        rows, columns = (x[counted].to(self.counts.device, torch.int64) for x in (labels, predictions))
        k = len(self.counts)
        both = torch.cat([rows, columns])
        if len(both) and (both.min() < 0 or both.max() >= k):
            raise ValueError(f"classes must be 0 to {k - 1}, got {int(both.min())} to {int(both.max())}")
        self.counts += torch.bincount(k * rows + columns, minlength=k * k).view(k, k)

    def gather(self, accelerator: Any) -> None:
        """Adds what all processes counted, so that each has the whole; to be called once by all of them."""
        self.counts = accelerator.reduce(self.counts, "sum")

    def scores(self) -> SegmentationScores:
        """Returns the scores.

        Raises:
            ValueError: If no pixel was counted.
        """
        counts = self.counts.cpu().double()
        if not counts.sum():
            raise ValueError("scores need at least one pixel that counts, got none")
        right, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou = right / (labelled + predicted - right)  # 0 / 0 is nan: the class does not occur
        return SegmentationScores(
            miou=float(iou.nanmean()),
            mean_accuracy=float((right / labelled).nanmean()),
            pixel_accuracy=float(right.sum() / counts.sum()),
            iou=tuple(iou.tolist()),
        )
