"""The whole detector: images → canvas → maps → proposals → boxes, labels, scores and masks of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from iwin_tasks.detection.mmdet_names import from_mmdet
from iwin_tasks.detection.proposals import CANVAS_MULTIPLE, ProposalNetwork
from iwin_tasks.detection.pyramid import PyramidBackbone
from iwin_tasks.detection.regions import paste_masks
from iwin_tasks.detection.roi_heads import CascadeRoIHeads

SHORT_SIDE, LONG_SIDE = 800, 1333
MEAN = [123.675 / 255, 116.28 / 255, 103.53 / 255]
STD = [58.395 / 255, 57.12 / 255, 57.375 / 255]
TARGET_KEYS = ("boxes", "labels", "masks")


class CanvasTransform(GeneralizedRCNNTransform):
    """Images (3, H, W) in 0 to 1 → one canvas (B, 3, H, W), normalised, each image at the top left.

    At test an image is resized to 800 px of its shorter side and 1333 of its longer one at most (`min_size`
    and `max_size`); in training it stays as the data have it. Differs from torchvision: sides are rounded to
    the nearest pixel, and masks are pasted at pixel centres.
    """

    min_size: tuple[int, ...]

    def __init__(self):
        super().__init__(SHORT_SIDE, LONG_SIDE, MEAN, STD, size_divisible=CANVAS_MULTIPLE)

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Returns an image at the size of the canvas, and its target as it is."""
        if self.training:
            return image, target
        short, long = sorted(image.shape[-2:])
        scale = min(self.max_size / long, self.min_size[-1] / short)
        size = [max(1, int(side * scale + 0.5)) for side in image.shape[-2:]]
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0], target

    def pad(self, images: Sequence[Tensor]) -> ImageList:
        """Returns the canvas of images (3, H, W) in 0 to 1 at the size that they have."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        normalised = [self.normalize(image) for image in images]
        return ImageList(self.batch_images(normalised, self.size_divisible), sizes)

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Returns detections on the canvas as those of the images; masks become bool (n, H, W)."""
        detections = []
        for found, size, original in zip(result, image_shapes, original_image_sizes, strict=True):
            boxes = resize_boxes(found["boxes"], list(size), list(original))
            masks = paste_masks(found["masks"], boxes, original)
            detections.append({**found, "boxes": boxes, "masks": masks})
        return detections


class Detector(GeneralizedRCNN):
    """Images → boxes, labels, scores and masks; in training images and targets → losses by name.

    Made by `build_detector`.

    Args:
        name: As `build_detector` takes it.
        num_classes: Of objects.
        backbone: (B, 3, H, W) → maps by name.
        rpn: Maps → boxes.
        roi_heads: Maps and boxes → detections on the canvas.
    """

    transform: CanvasTransform
    backbone: PyramidBackbone
    rpn: ProposalNetwork
    roi_heads: CascadeRoIHeads

    def __init__(
        self, name: str, num_classes: int, backbone: nn.Module, rpn: nn.Module, roi_heads: nn.Module
    ):
        super().__init__(backbone, rpn, roi_heads, CanvasTransform())
        self.name = name
        self.num_classes = num_classes

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        proposals: Sequence[Tensor] | None = None,
    ) -> Any:
        """Returns the losses in training, else the detections.

        Args:
            images: Of any sizes (3, H, W), RGB in 0 to 1.
            targets: For training, of each image its `boxes` (n, 4) x1, y1, x2, y2 in pixels, `labels` (n,),
                int64 from 0, and `masks` (n, H, W) of 0 and 1; n may be 0.
            proposals: Boxes of each image (n, 4), in its pixels, for the second part in place of those of the
                proposal network.

        Returns:
            In training `loss_rpn_cls`, `loss_rpn_bbox`, `loss_cls`, `loss_bbox` and `loss_mask`, of a cascade
            the last three as `s0.loss_cls` …; their sum is the loss. Else of each image at most 100 `boxes`
            (n, 4) in its pixels, best first, `scores` (n,), `labels` (n,) from 0 and `masks` (n, H, W), bool.

        Raises:
            ValueError: If targets are missing in training, or one is invalid.
        """
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        if self.training:
            check_targets(targets, sizes, self.num_classes)
        canvas, _ = self.transform(list(images))
        if proposals is not None:
            resized = zip(proposals, sizes, canvas.image_sizes, strict=True)
            proposals = [resize_boxes(boxes, list(size), list(new)) for boxes, size, new in resized]
        found = self.forward_canvas(canvas, targets if self.training else None, proposals)
        if self.training:
            return found
        return self.transform.postprocess(found, canvas.image_sizes, sizes)

    def forward_canvas(
        self,
        canvas: ImageList,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        proposals: Sequence[Tensor] | None = None,
    ) -> Any:
        """Returns what `forward` does, for images that are normalised and on a canvas already.

        Args:
            canvas: (B, 3, H, W), and each image's height and width on it; its sides are multiples of 32.
            targets: As `forward` has them, unchecked, in pixels of the canvas.
            proposals: As `forward` has them, in pixels of the canvas.

        Returns:
            As `forward` does, but boxes in pixels of the canvas, and as `masks` the probabilities (n, 28, 28)
            in the boxes.
        """
        prepared = (
            None
            if targets is None
            else [
                {**target, "labels": target["labels"] + 1, "size": torch.tensor(size)}
                for target, size in zip(targets, canvas.image_sizes, strict=True)
            ]
        )
        features = self.backbone(canvas.tensors)
        losses: dict[str, Tensor] = {}
        boxes = None if proposals is None else list(proposals)
        if self.training or boxes is None:
            own, losses = self.rpn(canvas, features, prepared)
            boxes = own if boxes is None else boxes
        detections, more = self.roi_heads(features, boxes, canvas.image_sizes, prepared)
        if self.training:
            return losses | more
        return [{**found, "labels": found["labels"] - 1} for found in detections]

    def official_state(self, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """Returns the authors' weights by the names of this model, or its own as they are, and none left out.

        Raises:
            ValueError: If they are of another detector.
        """
        return from_mmdet(given, self.name, self.state_dict()), ()


def check_targets(
    targets: Sequence[Mapping[str, Tensor]] | None, sizes: Sequence[tuple[int, int]], num_classes: int
) -> None:
    """Raises ValueError unless there is a valid target for each image of these sizes."""
    if targets is None or len(targets) != len(sizes):
        came = "none" if targets is None else len(targets)
        raise ValueError(f"training needs one target for each image, got {came} for {len(sizes)}")
    for index, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        if any(key not in target for key in TARGET_KEYS):
            raise ValueError(
                f"a target must have {', '.join(TARGET_KEYS)}, got {list(target)} of image {index}"
            )
        boxes, labels, masks = (target[key] for key in TARGET_KEYS)
        shapes = (tuple(boxes.shape), tuple(labels.shape), tuple(masks.shape))
        count = len(labels)
        if shapes != ((count, 4), (count,), (count, *size)):
            raise ValueError(
                f"boxes (n, 4), labels (n,) and masks (n, H, W) must be of n objects of an image of {size}, "
                f"got {', '.join(map(str, shapes))} of image {index}"
            )
        if labels.is_floating_point() or not bool(((labels >= 0) & (labels < num_classes)).all()):
            raise ValueError(
                f"labels must be whole numbers from 0 to {num_classes - 1}, "
                f"got {labels.tolist()} of image {index}"
            )
        flat = boxes[(boxes[:, 2:] <= boxes[:, :2]).any(dim=1)]
        if len(flat):
            raise ValueError(f"boxes must have x1 < x2 and y1 < y2, got {flat[0].tolist()} of image {index}")
