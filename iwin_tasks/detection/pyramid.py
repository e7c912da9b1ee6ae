"""The backbone of a detector: four maps of any network, and a feature pyramid over them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

STRIDES = (4, 8, 16, 32)
"""Of the four maps, in pixels."""


class PyramidBackbone(nn.Module):
    """(B, 3, H, W) → five maps (B, channels, h, w) by name, of strides 4 to 64.

    The fifth is every second point of the fourth.

    Args:
        body: Gives four NCHW maps of strides 4, 8, 16 and 32.
        widths: Channels of the four maps.
        channels: Of each map of the pyramid.

    Raises:
        ValueError: From `forward`, if the maps have other strides.
    """

    def __init__(self, body: nn.Module, widths: Sequence[int], channels: int):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(widths), channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the maps of the pyramid; the sides of x must be multiples of 32."""
        maps = self.body(x)
        sides = [tuple(m.shape[-2:]) for m in maps]
        if sides != [(x.shape[-2] // stride, x.shape[-1] // stride) for stride in STRIDES]:
            raise ValueError(
                f"a detector's backbone must give maps of strides {STRIDES}, "
                f"got maps of {sides} for an input of {tuple(x.shape[-2:])}"
            )
        return self.fpn({str(level): m for level, m in enumerate(maps)})
