"""The Iwin backbone of dense tasks: a normed map of every stage, as the authors' dense code gives them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iwin_core.backbone.backbone import IwinTransformer
from iwin_core.backbone.config import IwinConfig


class IwinFeatures(IwinTransformer):
    """(B, 3, H, W) → a normed map (B, C·2ⁱ, ⌈H/(4·2ⁱ)⌉, ⌈W/(4·2ⁱ)⌉) of each stage i; any H × W.

    Padding is `zeros` unless said otherwise, every stage but the last has its convolution whatever the window
    and the size, and there is no head.

    Args:
        config: What it is made of; None means Iwin-T.
        **options: Fields of IwinConfig, over those of `config`.

    Raises:
        ValueError: If an option is invalid.

    Source: the released detection and segmentation code, whose state-dict keys it has.
    """

    def __init__(self, config: IwinConfig | None = None, **options: Any):
        super().__init__(config or IwinConfig(padding="zeros"), **{**options, "feature_norms": True})
        self.channels = [self.config.embed_dim * 2**stage for stage in range(len(self.config.depths))]

    def forward(self, x: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the maps, NCHW, the finest first."""
        maps = self.forward_stages(x)
        return [self.normed(m, stage).movedim(-1, 1).contiguous() for stage, m in enumerate(maps)]
