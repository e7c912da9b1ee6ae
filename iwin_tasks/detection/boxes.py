"""Boxes as the authors' detectors have them: anchors, offsets, and which object a box is matched to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

ANCHOR_SCALE = 8
"""Side of a square anchor by the stride of its map."""
ANCHOR_RATIOS = (0.5, 1.0, 2.0)
"""Height by width."""
BACKGROUND = -1
IGNORED = -2


class StrideAnchors(AnchorGenerator):
    """Anchors of `scale` strides at every point of every map, in pixels of the canvas.

    Differs from torchvision: base anchors are not rounded, and strides are those given, not the canvas by the
    map, which is less where the side of the last map was rounded up.

    Args:
        strides: Of each map, in pixels.
        scale: Side of a square anchor by the stride of its map.
    """

    def __init__(self, strides: Sequence[int], scale: float = ANCHOR_SCALE):
        self.strides = tuple(strides)
        sizes = tuple((scale * stride,) for stride in strides)
        super().__init__(sizes, (ANCHOR_RATIOS,) * len(sizes))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (torchvision's signature)
    ) -> Tensor:
        """Returns the anchors about the origin: (ratios × scales, 4)."""
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        half = (
            torch.stack([(sides / heights[:, None]).flatten(), (sides * heights[:, None]).flatten()], 1) / 2
        )
        return torch.cat([-half, half], dim=1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Returns the anchors (n, 4) of each image, float32 whatever the maps are."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [list(m.shape[-2:]) for m in feature_maps]
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)


class OffsetCoder(BoxCoder):
    """Boxes ↔ offsets (dx, dy, dw, dh) from other boxes, in float32.

    Differs from torchvision: a box shrinks to 16/1000 of its sides at the least, as it grows to 1000/16 at
    most, and boxes keep their precision where the offsets have less (in bfloat16, 1001 px would become 1000).
    """

    def decode(self, rel_codes: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Returns the moved boxes (n, k, 4) for offsets (n, 4k) of the boxes of all images."""
        return self.decode_single(rel_codes, torch.cat(list(boxes))).unflatten(1, (-1, 4))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Returns the moved boxes (n, 4k) for offsets (n, 4k) of boxes (n, 4)."""
        offsets = rel_codes.float().unflatten(1, (-1, 4))
        least = -self.bbox_xform_clip * offsets.new_tensor(self.weights[2:])
        offsets = torch.cat([offsets[..., :2], offsets[..., 2:].maximum(least)], dim=-1)
        return super().decode_single(offsets.flatten(1), boxes)


def match(iou: Tensor, positive: float, negative: float, best_from: float | None = None) -> Tensor:
    """Returns for each box the object that it is matched to, or BACKGROUND or IGNORED.

    Args:
        iou: Of objects and boxes (objects, n); there may be no object.
        positive: From here on a box is of the object that it overlaps most.
        negative: Below it is background; between the two it is ignored.
        best_from: An object also takes the boxes that overlap it most, if they do by this; of several objects
            the last takes a box. None means it does not.

    Returns:
        (n,), int64.

    Source: mmdetection's MaxIoUAssigner; torchvision's leaves such a box with the object it overlaps most.
    """
    if not len(iou):
        return torch.full((iou.shape[1],), BACKGROUND, device=iou.device)
    overlap, matched = iou.max(dim=0)
    matched = matched.masked_fill(overlap < positive, IGNORED).masked_fill(overlap < negative, BACKGROUND)
    if best_from is not None:
        best = iou.max(dim=1, keepdim=True).values
        order = torch.arange(1, len(iou) + 1, device=iou.device)[:, None]
        takes = (((iou == best) & (best >= best_from)) * order).amax(dim=0)
        matched = torch.where(takes > 0, takes - 1, matched)
    return matched
