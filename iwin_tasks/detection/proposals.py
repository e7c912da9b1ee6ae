"""The region proposal network: torchvision's, with the targets and losses of the authors' configurations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

from iwin_tasks.detection.boxes import ANCHOR_RATIOS, BACKGROUND, OffsetCoder, StrideAnchors, match

CANVAS_MULTIPLE = 32
"""An image is padded to a multiple of this, in pixels; a batch then to its largest."""
PER_LEVEL = {"training": 2000, "testing": 1000}
"""Boxes of a map, the best by score, that enter the suppression of overlaps."""
KEPT_AT_TEST = 1000


class ProposalHead(RPNHead):
    """Maps (B, C, h, w) → logits (B, 3, h, w), offsets (B, 12, h, w); float32 also under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the logits and the offsets of each map."""
        logits, offsets = super().forward(x)
        return [t.float() for t in logits], [t.float() for t in offsets]


class ProposalNetwork(RegionProposalNetwork):
    """Maps → boxes in which objects may be, and in training `loss_rpn_cls` and `loss_rpn_bbox`.

    Args:
        channels: Of the maps.
        strides: Of the maps, in pixels.
        kept: Boxes of an image that training keeps.
        beta: Where the smooth L1 loss becomes linear; 0 means L1.
        inside: Whether anchors that leave the image are left out of training.
    """

    def __init__(self, channels: int, strides: Sequence[int], *, kept: int, beta: float, inside: bool):
        super().__init__(
            StrideAnchors(strides),
            ProposalHead(channels, len(ANCHOR_RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=PER_LEVEL,
            post_nms_top_n={"training": kept, "testing": KEPT_AT_TEST},
            nms_thresh=0.7,
        )
        self.strides = tuple(strides)
        self.box_coder = OffsetCoder((1.0, 1.0, 1.0, 1.0))
        self.beta = beta
        self.inside = inside

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Returns the boxes (n, 4) of each image, best first, in pixels of the canvas, and the losses.

        Args:
            images: The canvas (B, 3, H, W) and each image's height and width on it.
            features: Maps by name, the finest first.
            targets: Of each image `boxes` (n, 4), and its height and width as `size`; for training.
        """
        boxes, losses = super().forward(images, features, targets)
        names = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_bbox"}
        return boxes, {names[name]: loss for name, loss in losses.items()}

    def limit_boxes(self, most: int) -> None:
        """Hands on at most so many boxes of an image, and as many of each map before overlaps are removed."""
        self._pre_nms_top_n = self._post_nms_top_n = {"training": most, "testing": most}

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns of each image its anchors' labels (1 object, 0 background, -1 unused) and objects."""
        labels, matched_boxes = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            usable = self.usable(boxes, target["size"])
            iou = box_iou(target["boxes"], boxes).masked_fill(~usable, BACKGROUND)
            matched = match(iou, 0.7, 0.3, best_from=0.3)
            label = torch.where(matched >= 0, 1.0, torch.where(matched == BACKGROUND, 0.0, -1.0))
            labels.append(label.masked_fill(~usable, -1.0))
            matched_boxes.append(F.pad(target["boxes"], (0, 0, 0, 1))[matched.clamp(min=BACKGROUND)])
        return labels, matched_boxes

    def usable(self, anchors: Tensor, size: Tensor) -> Tensor:
        """Returns which anchors take part in training: those on its own padding, or wholly inside it."""
        height, width = size.tolist()
        if self.inside:
            return (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
        # What the batch's largest image adds past an image's own padding is unused. Centres are whole pixels.
        x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
        down, right = (-(-side // CANVAS_MULTIPLE) * CANVAS_MULTIPLE for side in (height, width))
        return (x < right - 0.5) & (y < down - 0.5)

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses of objectness and offsets, both divided by the anchors drawn in the batch."""
        positives, negatives = self.fg_bg_sampler(labels)
        # As in the authors' code, an image that has none of a kind counts one.
        drawn = torch.stack([mask.sum() for mask in (*positives, *negatives)]).clamp(min=1).sum()
        positive = torch.cat(positives).bool()
        used = positive | torch.cat(negatives).bool()
        offsets, wanted = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        box_loss = F.smooth_l1_loss(offsets, wanted, beta=self.beta, reduction="sum") / drawn
        logits, target = objectness.flatten()[used], torch.cat(labels)[used]
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / drawn, box_loss
