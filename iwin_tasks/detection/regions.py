"""From maps to what lies in a box, and back: pooling, mask targets, and masks pasted onto the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

FINEST_SIDE = 56
"""In pixels: boxes of up to twice this side are pooled from the finest map."""
MASK_THRESHOLD = 0.5


def indexed_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """Returns the boxes of all images (n, 5), each after the number of its image."""
    return torch.cat([F.pad(b.float(), (1, 0), value=image) for image, b in enumerate(boxes)])


def pyramid_level(boxes: Tensor, levels: int) -> Tensor:
    """Returns the map (n,) from which each box (n, 4) is pooled: ⌊log₂(√area / 56 + 10⁻⁶)⌋, within the maps.

    Source: mmdetection; torchvision adds the small number outside the logarithm.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    level = torch.log2(sides.prod(dim=1).sqrt() / FINEST_SIDE + 1e-6).floor()
    return level.clamp(0, levels - 1).long()


class AlignedPooler(nn.Module):
    """Maps by name, boxes of each image → (n, C, side, side), float32: RoIAlign, aligned to pixel centres.

    Differs from torchvision's MultiScaleRoIAlign, which has no `aligned`: half a pixel of the map.

    Args:
        strides: Of the maps that are pooled from, the first ones, in pixels.
        side: Of the result.
    """

    def __init__(self, strides: Sequence[int], side: int):
        super().__init__()
        self.strides = tuple(strides)
        self.side = side

    def forward(self, features: Mapping[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Returns what lies in the boxes (n, 4), in pixels of the canvas, of all images."""
        rois = indexed_boxes(boxes)
        maps = list(features.values())[: len(self.strides)]
        levels = pyramid_level(rois[:, 1:], len(maps))
        pooled = rois.new_zeros(rois.shape[0], maps[0].shape[1], self.side, self.side)
        for level, (m, stride) in enumerate(zip(maps, self.strides, strict=True)):
            own = (levels == level).nonzero()[:, 0]
            pooled[own] = roi_align(m.float(), rois[own], self.side, 1 / stride, aligned=True)
        return pooled


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, side: int) -> Tensor:
    """Returns what each box's mask should be: (p, side, side) of 0 and 1, float32.

    Args:
        masks: Of the objects (n, H, W), 0 or 1.
        boxes: (p, 4), in pixels.
        matched: Which object each box is of (p,).
        side: In pixels of the mask head.
    """
    rois = torch.cat([matched[:, None].to(boxes), boxes], dim=1)
    pooled = roi_align(masks[:, None].to(boxes), rois, side, 1.0, aligned=True)[:, 0]
    return (pooled >= MASK_THRESHOLD).to(boxes)


def paste_mask(mask: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Returns a mask on the whole image (H, W), bool: read at pixel centres, linear, from 0.5 on.

    Args:
        mask: Probabilities (h, w) in the box.
        box: (4,), in pixels; it may leave the image.
        size: Height and width of the image, in pixels.
    """
    height, width = size
    x_1, y_1, x_2, y_2 = box.tolist()
    rows = range(max(0, int(y_1) - 1), max(0, min(height, int(y_2) + 2)))
    columns = range(max(0, int(x_1) - 1), max(0, min(width, int(x_2) + 2)))
    pasted = torch.zeros(height, width, dtype=torch.bool, device=mask.device)
    if len(rows) and len(columns) and x_2 > x_1 and y_2 > y_1:
        y = (torch.arange(rows.start, rows.stop, device=mask.device) + 0.5 - box[1]) / (
            box[3] - box[1]
        ) * 2 - 1
        x = (torch.arange(columns.start, columns.stop, device=mask.device) + 0.5 - box[0]) / (
            box[2] - box[0]
        ) * 2 - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]  # (1, rows, columns, 2)
        read = F.grid_sample(mask[None, None].float(), grid, align_corners=False)[0, 0]
        pasted[rows.start : rows.stop, columns.start : columns.stop] = read >= MASK_THRESHOLD
    return pasted


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Returns masks on the whole image (n, H, W), bool, of probabilities (n, h, w) in boxes (n, 4)."""
    pasted = [paste_mask(mask, box, size) for mask, box in zip(masks, boxes, strict=True)]
    return torch.stack(pasted) if pasted else torch.zeros(0, *size, dtype=torch.bool, device=masks.device)
