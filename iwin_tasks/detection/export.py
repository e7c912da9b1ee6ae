"""A detector as one exported program: an image of a fixed size → boxes, scores, labels and masks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

from iwin_tasks.detection.detector import Detector


class ImageDetector(nn.Module):
    """An image (3, H, W) in 0 to 1 → boxes (n, 4), scores (n,), labels (n,) from 0, masks (n, 28, 28).

    The image is not resized; masks are probabilities in the boxes, as `paste_masks` takes them.

    Args:
        detector: Its transform normalises and pads.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what is found, the best first."""
        detector = self.detector
        canvas = detector.transform.pad([image])
        features = detector.backbone(canvas.tensors)
        boxes, _ = detector.rpn(canvas, features)
        torch._check(boxes[0].shape[0] > 0)  # a cascade's BatchNorms ask for it
        (found,), _ = detector.roi_heads(features, boxes, canvas.image_sizes)
        return found["boxes"], found["scores"], found["labels"] - 1, found["masks"]


@contextmanager
def nms_without_branches(side: int) -> Iterator[None]:
    """Makes torchvision's `batched_nms` a formula for a while: boxes of classes far from each other.

    Its own one asks how many boxes there are, which a program cannot know. The program of torchvision's `nms`
    takes it that two boxes are kept at least: two that overlap none are added, and left out of what is kept.

    Args:
        side: That no box passes, in pixels.
    """

    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        outside = boxes.new_tensor([[-4, -4, -3, -3], [-2, -2, -1, -1]])
        apart = torch.cat([boxes + (idxs.to(boxes) * (side + 1))[:, None], outside])
        kept = box_ops.nms(apart, F.pad(scores, (0, 2), value=-math.inf), iou_threshold)
        return kept[kept < boxes.shape[0]]

    own = box_ops.batched_nms
    box_ops.batched_nms = batched_nms
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`create_unbacked_symint` is deprecated"
            )  # torchvision calls it
            yield
    finally:
        box_ops.batched_nms = own


@torch.no_grad()
def export_detector(detector: Detector, height: int, width: int) -> torch.export.ExportedProgram:
    """Returns the program of an `ImageDetector`, which `torch.export.save` writes.

    Args:
        detector: Unchanged, but in evaluation mode afterwards.
        height: Of the images that the program takes, in pixels.
        width: Likewise.

    Raises:
        ValueError: If a side is not positive.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    model = ImageDetector(detector).eval()
    image = torch.zeros(3, height, width, device=next(detector.parameters()).device)
    with nms_without_branches(max(height, width)):
        return torch.export.export(model, (image,), strict=False)
