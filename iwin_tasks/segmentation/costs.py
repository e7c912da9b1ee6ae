"""FLOPs of a segmenter."""

from __future__ import annotations

import torch

from flashdit.shared.flops import count_flops
from iwin_tasks.segmentation.model import Segmenter


def segmenter_flops(segmenter: Segmenter, height: int, width: int) -> int:
    """Returns the FLOPs of one image's logits, two for a multiply-add of a product or convolution.

    The auxiliary head, which training alone uses, is not counted, as in mmsegmentation's `forward_dummy`.

    Args:
        segmenter: Unchanged.
        height: Of the image, in pixels.
        width: Likewise.
    """
    return count_flops(segmenter, lambda blank: blank(torch.empty(1, 3, height, width)))
