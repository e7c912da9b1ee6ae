"""What turns four maps into logits: UPerNet's head, the Semantic FPN and its neck, an auxiliary FCN head.

Parameters have mmsegmentation's names, so that its checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PYRAMID = (1, 2, 3, 6)
"""Sides of UPerNet's pooled maps."""
AUXILIARY_LEVEL = 2
"""Which map the auxiliary head takes, from 0."""
CLASSIFIER_STD = 0.01


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Returns a map (B, C, h, w) at other sides, bilinear between pixel centres (align_corners False)."""
    return F.interpolate(x, size=[int(side) for side in size], mode="bilinear", align_corners=False)


def add_from_above(levels: list[Tensor], mode: str) -> list[Tensor]:
    """Returns maps, the finest first, each with the one above it added, which `mode` brings to its sides."""
    found = levels[-1:]
    for finer in reversed(levels[:-1]):
        size = [int(side) for side in finer.shape[-2:]]
        found.insert(0, finer + F.interpolate(found[0], size=size, mode=mode))
    return found


class ConvNorm(nn.Module):
    """(B, C, H, W) → (B, width, H, W): convolution without bias, BatchNorm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map."""
        return F.relu(self.bn(self.conv(x)))


class Upsample(nn.Module):
    """(B, C, H, W) → (B, C, 2H, 2W), bilinear."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map at twice the sides."""
        return resized(x, (2 * x.shape[-2], 2 * x.shape[-1]))


class LogitsHead(nn.Module):
    """What all heads end with: dropout of whole channels and a 1×1 convolution to the classes."""

    def __init__(self, width: int, num_classes: int, dropout: float):
        super().__init__()
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        self.dropout = nn.Dropout2d(dropout)
        nn.init.normal_(self.conv_seg.weight, std=CLASSIFIER_STD)
        nn.init.zeros_(cast(Tensor, self.conv_seg.bias))

    def classify(self, x: Tensor) -> Tensor:
        """Returns the logits (B, K, H, W) of a map (B, width, H, W)."""
        return self.conv_seg(self.dropout(x))


class UPerHead(LogitsHead):
    """Four maps → logits (B, K, h, w) of the first map's sides: pyramid pooling, then a feature pyramid.

    Source: UPerNet (arXiv 1807.10221), as in mmsegmentation 0.11.
    """

    def __init__(self, channels: Sequence[int], width: int, num_classes: int, dropout: float):
        super().__init__(width, num_classes, dropout)
        *finer, top = channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(pool), ConvNorm(top, width, 1)) for pool in PYRAMID
        )
        self.bottleneck = ConvNorm(top + len(PYRAMID) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNorm(dim, width, 1) for dim in finer)
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3) for _ in finer)
        self.fpn_bottleneck = ConvNorm(len(channels) * width, width, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns the logits."""
        top = maps[-1]
        pooled = [resized(pool(top), top.shape[-2:]) for pool in self.psp_modules]
        levels = [conv(m) for conv, m in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.bottleneck(torch.cat([top, *pooled], dim=1)))
        levels = add_from_above(levels, "bilinear")
        outs = [conv(m) for conv, m in zip(self.fpn_convs, levels[:-1], strict=True)]
        size = outs[0].shape[-2:]
        joined = [outs[0], *(resized(m, size) for m in (*outs[1:], levels[-1]))]
        return self.classify(self.fpn_bottleneck(torch.cat(joined, dim=1)))


class NeckConv(nn.Module):
    """(B, C, H, W) → (B, width, H, W): a convolution under the name that mmsegmentation gives it."""

    def __init__(self, channels: int, width: int, kernel: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(cast(Tensor, self.conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map."""
        return self.conv(x)


class FPNNeck(nn.Module):
    """Four maps → four maps of one width: a top-down path of nearest neighbours.

    Source: Feature Pyramid Networks (arXiv 1612.03144), as in mmsegmentation 0.11.
    """

    def __init__(self, channels: Sequence[int], width: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(NeckConv(dim, width, 1) for dim in channels)
        self.fpn_convs = nn.ModuleList(NeckConv(width, width, 3) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns the maps."""
        levels = [conv(m) for conv, m in zip(self.lateral_convs, maps, strict=True)]
        levels = add_from_above(levels, "nearest")
        return [conv(m) for conv, m in zip(self.fpn_convs, levels, strict=True)]


class FPNHead(LogitsHead):
    """Four maps of a neck → logits (B, K, h, w) of the first map's sides: each upsampled, then their sum.

    Source: Panoptic FPN (arXiv 1901.02446), as in mmsegmentation 0.11.
    """

    def __init__(self, levels: int, channels: int, width: int, num_classes: int, dropout: float):
        super().__init__(width, num_classes, dropout)
        self.scale_heads = nn.ModuleList(self._scale_head(level, channels, width) for level in range(levels))

    @staticmethod
    def _scale_head(level: int, channels: int, width: int) -> nn.Sequential:
        """Returns one convolution for each doubling up to the first map's sides, at least one."""
        if level == 0:
            return nn.Sequential(ConvNorm(channels, width, 3))
        dims = [channels, *[width] * level]
        pairs = ((ConvNorm(a, b, 3), Upsample()) for a, b in pairwise(dims))
        return nn.Sequential(*(part for pair in pairs for part in pair))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns the logits."""
        scaled = [head(m) for head, m in zip(self.scale_heads, maps, strict=True)]
        total = scaled[0]
        for m in scaled[1:]:
            total = total + resized(m, total.shape[-2:])
        return self.classify(total)


class FCNHead(LogitsHead):
    """Four maps → logits (B, K, h, w) of the third map's sides: one convolution; for training alone.

    Source: FCN (arXiv 1411.4038), as in mmsegmentation 0.11.
    """

    def __init__(self, channels: Sequence[int], width: int, num_classes: int, dropout: float):
        super().__init__(width, num_classes, dropout)
        self.convs = nn.Sequential(ConvNorm(channels[AUXILIARY_LEVEL], width, 3))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Returns the logits."""
        return self.classify(self.convs(maps[AUXILIARY_LEVEL]))
