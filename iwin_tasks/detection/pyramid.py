"""The backbone of a detector: four maps of any network, and a feature pyramid over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from flashdit.shared.registry import unknown

MAPS = 4
PROBE = (1, 3, 128, 160)
"""Of the picture by which the maps of a module are seen."""


class PyramidBackbone(nn.Module):
    """(B, 3, H, W) → five maps (B, channels, h, w) by name, the finest first.

    The fifth is every second point of the fourth.

    Args:
        body: Gives four NCHW maps.
        widths: Channels of the four maps.
        channels: Of each map of the pyramid.
    """

    def __init__(self, body: nn.Module, widths: Sequence[int], channels: int):
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(widths), channels, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the maps of the pyramid."""
        return self.fpn({str(level): m for level, m in enumerate(self.body(x))})


def make_body(
    backbone: str | nn.Module, options: Mapping[str, Any] | None
) -> tuple[nn.Module, list[int], list[int]]:
    """Returns a network that gives four maps, their channels, and their strides in pixels.

    Args:
        backbone: A timm name, of which the last four maps are taken, or a module.
        options: For `timm.create_model`; for a name alone.

    Raises:
        ValueError: If the name is unknown, or the maps are not four whose sides halve.
    """
    if isinstance(backbone, nn.Module):
        if options:
            raise ValueError(f"backbone_options are for a backbone given by name, got {dict(options)}")
        return backbone, *probed_maps(backbone)
    if not timm.is_model(backbone):
        raise unknown("backbone", backbone, timm.list_models("iwin_*"))
    body = timm.create_model(
        backbone, features_only=True, out_indices=tuple(range(-MAPS, 0)), **dict(options or {})
    )
    info = cast(Any, body).feature_info
    return body, info.channels(), info.reduction()


def probed_maps(body: nn.Module) -> tuple[list[int], list[int]]:
    """Returns the channels and strides of a module's maps, as a picture of zeros shows them."""
    device = next((p.device for p in body.parameters()), None)
    was_training = body.training
    body.eval()
    with torch.no_grad():
        maps = list(body(torch.zeros(PROBE, device=device)))
    body.train(was_training)
    shapes = [tuple(m.shape) for m in maps]
    strides = [PROBE[2] // shape[2] for shape in shapes if len(shape) == 4]
    halved = all(
        (s * h, s * w) == PROBE[2:] for s, (_, _, h, w) in zip(strides, shapes, strict=False)
    ) and all(coarse == 2 * fine for fine, coarse in pairwise(strides))
    if len(strides) != MAPS or len(shapes) != MAPS or not halved:
        raise ValueError(
            f"a backbone must give {MAPS} maps (B, C, h, w), each of half the sides of the one before, "
            f"got {shapes} for {PROBE}"
        )
    return [shape[1] for shape in shapes], strides
