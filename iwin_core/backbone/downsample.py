"""Halving a map between stages: the paper's four downsamplers (Table VII)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def even(x: Tensor) -> Tensor:
    """Returns the map (B, H, W, C) with a zero row and column at its far ends where a side is odd."""
    odd_rows, odd_columns = x.shape[1] % 2, x.shape[2] % 2
    return F.pad(x, (0, 0, 0, odd_columns, 0, odd_rows)) if odd_rows or odd_columns else x


def to_padded_nchw(x: Tensor) -> Tensor:
    """Returns (B, C, H + 1, W + 1): one zero row at the bottom and one zero column at the right."""
    return F.pad(x, (0, 0, 0, 1, 0, 1)).movedim(-1, 1)  # in this order it stays channels-last in memory


class ConvDownsample(nn.Module):
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): LN, pad, 3×3 convolution with stride 2; the paper's choice.

    Source: Iwin paper, eq. (6); padding as in the released code.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv = nn.Conv2d(dim, 2 * dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the halved map."""
        return self.conv(to_padded_nchw(even(self.norm(x)))).movedim(1, -1)


class DepthwiseDownsample(nn.Module):
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): LN, pad, depthwise 3×3 with stride 2, Linear."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, stride=2, groups=dim)
        self.pointwise = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the halved map."""
        return self.pointwise(self.depthwise(to_padded_nchw(even(self.norm(x)))).movedim(1, -1))


class PoolDownsample(nn.Module):
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): LN, Linear, the mean of each 2×2.

    A Linear and a mean commute; this order is the one whose multiply-adds the paper prints.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.pointwise = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the halved map."""
        return F.avg_pool2d(self.pointwise(even(self.norm(x))).movedim(-1, 1), 2).movedim(1, -1)


class MergeDownsample(nn.Module):
    """(B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): the 2×2 tokens side by side, LN, Linear without bias.

    Source: Swin Transformer's patch merging.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the halved map."""
        return self.reduction(self.norm(rearrange(even(x), "b (h p) (w q) c -> b h w (q p c)", p=2, q=2)))


DOWNSAMPLES: dict[str, type[nn.Module]] = {
    "conv": ConvDownsample,
    "dwconv": DepthwiseDownsample,
    "pool": PoolDownsample,
    "merge": MergeDownsample,
}
