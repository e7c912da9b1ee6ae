"""FLOPs of a detector at a fixed number of boxes, so that they depend on no image."""

from __future__ import annotations

import torch

from flashdit.shared.flops import count_flops
from iwin_tasks.detection.detector import Detector
from iwin_tasks.detection.proposals import CANVAS_MULTIPLE, ProposalNetwork
from iwin_tasks.detection.roi_heads import BOX_SIDE, MASK_SIDE, CascadeRoIHeads

BOXES, MASKS = 1000, 100
"""Of an image in mmdetection's `forward_dummy`."""


def detector_flops(
    detector: Detector, height: int, width: int, *, boxes: int = BOXES, masks: int = MASKS
) -> int:
    """Returns the FLOPs of one image's forward pass, two for a multiply-add of a product or convolution.

    Counted are backbone with its attention, pyramid, proposal head and every stage's box and mask head;
    pooling, the choice of boxes and norms are not.

    Args:
        detector: Unchanged.
        height: Of the canvas, in pixels.
        width: Likewise.
        boxes: That each stage classifies.
        masks: That each stage draws.

    Raises:
        ValueError: If the canvas is not of multiples of 32 pixels.
    """
    if height < 1 or width < 1 or height % CANVAS_MULTIPLE or width % CANVAS_MULTIPLE:
        raise ValueError(
            f"a canvas must have sides of multiples of {CANVAS_MULTIPLE}, got {height} × {width}"
        )

    def forward(blank: Detector) -> None:
        maps = list(blank.backbone(torch.empty(1, 3, height, width)).values())
        rpn, roi_heads, channels = blank.rpn, blank.roi_heads, maps[0].shape[1]
        assert isinstance(rpn, ProposalNetwork)
        assert isinstance(roi_heads, CascadeRoIHeads)
        rpn.head(maps)
        for stage in range(len(roi_heads.coders)):
            boxed = torch.empty(boxes, channels, BOX_SIDE, BOX_SIDE)
            roi_heads.box_predictor[stage](roi_heads.box_head[stage](boxed))
            drawn = torch.empty(masks, channels, MASK_SIDE, MASK_SIDE)
            roi_heads.mask_predictor[stage](roi_heads.mask_head[stage](drawn))

    return count_flops(detector, forward)
