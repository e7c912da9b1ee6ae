"""The second part of both detectors: one stage or three that classify boxes, move them and draw masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss

from iwin_tasks.detection.boxes import OffsetCoder, match
from iwin_tasks.detection.regions import AlignedPooler, mask_targets

BOX_SIDE = 7
"""Points a side that are pooled for a box."""
MASK_SIDE = 14
"""Points a side that are pooled for a mask, which has twice as many."""
CONVOLUTIONS = 4
GIOU_WEIGHT = 10.0


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What one stage differs in from another."""

    iou: float
    """From here on a box is of an object."""
    offset_weights: tuple[float, float, float, float]
    """Factors of the offsets dx, dy, dw, dh: one by their deviation."""
    loss_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RoIOptions:
    """What the two detectors differ in after the proposals."""

    stages: tuple[StageOptions, ...]
    convolutions: bool
    """Whether the box head is four convolutions with BatchNorm and one Linear, or two Linears."""
    giou: bool
    """Whether the loss of a box is 10 · (1 − GIoU) of the box itself, or L1 of its offsets."""
    match_best: bool
    """Whether an object also takes the boxes that overlap it most; see `match`."""


@dataclass(kw_only=True)
class Sample:
    """Boxes of one image that a stage is trained on."""

    boxes: Tensor
    """(n, 4), in pixels of the canvas."""
    labels: Tensor
    """(n,): 0 background, then classes from 1."""
    matched: Tensor
    """(n,): which object of the image; -1 none."""
    added: Tensor
    """(n,), bool: whether the box is an object's own, put among the proposals."""


class BoxPredictor(nn.Module):
    """(n, C) → logits (n, K + 1), background first, and offsets (n, K, 4), float32 also under autocast."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.cls_score = nn.Linear(channels, num_classes + 1)
        self.bbox_pred = nn.Linear(channels, 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the logits and the offsets."""
        return self.cls_score(x).float(), self.bbox_pred(x).float().unflatten(1, (-1, 4))


def make_box_head(channels: int, hidden: int, width: int, convolutions: bool) -> nn.Module:
    """Returns (n, channels, 7, 7) → (n, width), through `hidden` channels if it has convolutions."""
    if convolutions:
        size = (channels, BOX_SIDE, BOX_SIDE)
        head = FastRCNNConvFCHead(size, [hidden] * CONVOLUTIONS, [width], norm_layer=nn.BatchNorm2d)
    else:
        head = TwoMLPHead(channels * BOX_SIDE**2, width)
    for layer in head.modules():
        if isinstance(layer, nn.Linear):  # as mmdetection does
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return head


class CascadeRoIHeads(RoIHeads):
    """Maps and boxes → detections, or losses: `loss_cls`, `loss_bbox`, `loss_mask`, after `s0.` … of several.

    With one stage it is Mask R-CNN's. With more, each stage's boxes are those that the stage before it moved;
    logits are averaged over the stages, and so are the probabilities of the masks.

    Args:
        options: The stages, and what they have in common.
        strides: Of the maps that are pooled from, in pixels.
        num_classes: Of objects.
        channels: Of the maps.
        width: Of the Linears of the box heads.
        hidden: Channels of the convolutions.

    Source: Cascade R-CNN (arXiv 1712.00726), as mmdetection has it and the authors' configurations set it.
    """

    mask_roi_pool: AlignedPooler
    mask_head: nn.ModuleList
    mask_predictor: nn.ModuleList

    def __init__(
        self,
        options: RoIOptions,
        strides: Sequence[int],
        *,
        num_classes: int,
        channels: int,
        width: int,
        hidden: int,
    ):
        stages = range(len(options.stages))
        super().__init__(
            AlignedPooler(strides, BOX_SIDE),
            nn.ModuleList(make_box_head(channels, hidden, width, options.convolutions) for _ in stages),
            nn.ModuleList(BoxPredictor(width, num_classes) for _ in stages),
            fg_iou_thresh=0.5,  # unused, as each stage has its own
            bg_iou_thresh=0.5,
            batch_size_per_image=512,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
            mask_roi_pool=AlignedPooler(strides, MASK_SIDE),
            mask_head=nn.ModuleList(MaskRCNNHeads(channels, (hidden,) * CONVOLUTIONS, 1) for _ in stages),
            mask_predictor=nn.ModuleList(MaskRCNNPredictor(hidden, hidden, num_classes) for _ in stages),
        )
        self.options = options
        self.coders = [OffsetCoder(stage.offset_weights) for stage in options.stages]
        self.box_coder = self.coders[-1]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Returns the detections of each image and no losses, or in training none and the losses.

        Args:
            features: Maps by name, the finest first.
            proposals: Boxes of each image (n, 4), in pixels of the canvas.
            image_shapes: Height and width of each image on the canvas.
            targets: Of each image `boxes` (n, 4), `labels` (n,) from 1 and `masks` (n, H, W); for training.

        Returns:
            Of each image at most 100 `boxes` (n, 4), best first, `scores`, `labels` from 1, and `masks`, the
            probabilities (n, 28, 28) in the box. The losses by name, with the weights of their stages.
        """
        if self.training:
            assert targets is not None
            return [], self.losses(features, proposals, image_shapes, targets)
        logits, offsets, boxes = self.forward_boxes(features, proposals, image_shapes)
        columns = F.pad(offsets, (0, 0, 1, 0)).flatten(1)  # torchvision also has offsets of background
        found = self.postprocess_detections(logits, columns, boxes, image_shapes)
        masks = self.forward_masks(features, found[0], found[2])
        return [
            {"boxes": b, "scores": s, "labels": n, "masks": m}
            for b, s, n, m in zip(*found, masks, strict=True)
        ], {}

    def classify(
        self, stage: int, features: Mapping[str, Tensor], boxes: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns a stage's logits (n, K + 1) and offsets (n, K, 4) for the boxes of all images."""
        return self.box_predictor[stage](self.box_head[stage](self.box_roi_pool(features, boxes)))

    def forward_boxes(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns the mean logits of all stages, the last one's offsets, and the boxes that entered it."""
        logits, offsets = self.classify(0, features, boxes)
        total = logits
        for stage in range(1, len(self.coders)):
            boxes = self.move(stage - 1, boxes, logits, offsets, sizes)
            logits, offsets = self.classify(stage, features, boxes)
            total = total + logits
        return total / len(self.coders), offsets, boxes

    def move(
        self,
        stage: int,
        boxes: list[Tensor],
        logits: Tensor,
        offsets: Tensor,
        sizes: list[tuple[int, int]],
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Returns the boxes of each image where a stage's offsets put them, cut off at the image.

        Args:
            stage: Whose logits and offsets they are.
            boxes: Of each image (n, 4).
            logits: (n, K + 1), of all images.
            offsets: (n, K, 4), of all images.
            sizes: Height and width of each image.
            labels: Of all images (n,): a box moves by its class, one of background by its best class, as all
                do where this is None.
        """
        best = logits[:, 1:].argmax(dim=1) + 1
        label = best if labels is None else torch.where(labels > 0, labels, best)
        chosen = offsets[torch.arange(offsets.shape[0], device=offsets.device), label - 1]
        moved = self.coders[stage].decode_single(chosen.detach(), torch.cat(boxes))
        parts = moved.split([b.shape[0] for b in boxes])
        return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]

    def forward_masks(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], labels: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Returns of each image the mean probabilities (n, 28, 28) of its boxes' masks at their labels."""
        pooled = self.mask_roi_pool(features, boxes)
        label = torch.cat(labels)
        total = torch.stack(
            [self.draw(stage, pooled, label).sigmoid() for stage in range(len(self.coders))]
        ).mean(dim=0)
        return total.split([b.shape[0] for b in boxes])

    def draw(self, stage: int, pooled: Tensor, labels: Tensor) -> Tensor:
        """Returns a stage's mask logits (n, 28, 28) at the labels (n,) from 1, float32."""
        logits = self.mask_predictor[stage](self.mask_head[stage](pooled)).float()
        return logits[torch.arange(logits.shape[0], device=logits.device), labels - 1]

    def sample(self, stage: int, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> list[Sample]:
        """Returns the boxes of each image that a stage is trained on.

        The objects' own boxes are put among the proposals; of those that are of an object at most 128 are
        drawn, and of the others what is missing to 512.
        """
        iou = self.options.stages[stage].iou
        samples = []
        for boxes, target in zip(proposals, targets, strict=True):
            boxes = torch.cat([target["boxes"], boxes])
            added = torch.arange(len(boxes), device=boxes.device) < len(target["boxes"])
            overlap = box_iou(target["boxes"], boxes)
            matched = match(overlap, iou, iou, iou if self.options.match_best else None)
            labels = F.pad(target["labels"], (0, 1))[matched]
            (drawn,) = self.subsample([labels])
            samples.append(
                Sample(boxes=boxes[drawn], labels=labels[drawn], matched=matched[drawn], added=added[drawn])
            )
        return samples

    def losses(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Returns the losses of all stages by name; arguments as `forward` has them."""
        losses = {}
        for stage, options in enumerate(self.options.stages):
            samples = self.sample(stage, boxes, targets)
            boxes = [s.boxes for s in samples]
            logits, offsets = self.classify(stage, features, boxes)
            own = self.box_losses(stage, logits, offsets, samples, targets)
            own["loss_mask"] = self.mask_loss(stage, features, samples, targets)
            prefix = f"s{stage}." if len(self.coders) > 1 else ""
            losses |= {f"{prefix}{name}": options.loss_weight * loss for name, loss in own.items()}
            if stage + 1 < len(self.coders):
                labels = torch.cat([s.labels for s in samples])
                moved = self.move(stage, boxes, logits, offsets, sizes, labels)
                boxes = [b[~s.added] for b, s in zip(moved, samples, strict=True)]
        return losses

    def box_losses(
        self,
        stage: int,
        logits: Tensor,
        offsets: Tensor,
        samples: list[Sample],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Returns a stage's losses of classes and of boxes, both divided by all boxes of the batch."""
        labels = torch.cat([s.labels for s in samples])
        positive = labels > 0
        chosen = offsets[positive, labels[positive] - 1]
        boxes = torch.cat([s.boxes for s in samples])[positive]
        truth = [t["boxes"][s.matched[s.labels > 0]] for s, t in zip(samples, targets, strict=True)]
        coder = self.coders[stage]
        if self.options.giou:
            moved = coder.decode_single(chosen, boxes)
            box_loss = GIOU_WEIGHT * generalized_box_iou_loss(moved, torch.cat(truth), reduction="sum")
        else:
            box_loss = F.l1_loss(chosen, coder.encode_single(torch.cat(truth), boxes), reduction="sum")
        count = max(len(labels), 1)
        class_loss = F.cross_entropy(logits, labels, reduction="sum")
        return {"loss_cls": class_loss / count, "loss_bbox": box_loss / count}

    def mask_loss(
        self,
        stage: int,
        features: Mapping[str, Tensor],
        samples: list[Sample],
        targets: list[dict[str, Tensor]],
    ) -> Tensor:
        """Returns a stage's loss of masks, the mean over boxes of objects and their points."""
        positive = [s.labels > 0 for s in samples]
        boxes = [s.boxes[p] for s, p in zip(samples, positive, strict=True)]
        labels = torch.cat([s.labels[p] for s, p in zip(samples, positive, strict=True)])
        logits = self.draw(stage, self.mask_roi_pool(features, boxes), labels)
        wanted = [
            mask_targets(t["masks"], b, s.matched[p], 2 * MASK_SIDE)
            for t, b, s, p in zip(targets, boxes, samples, positive, strict=True)
        ]
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted), reduction="sum")
        return loss / max(logits.numel(), 1)
