"""How images and their objects are changed together: the paper's multi-scale recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from flashdit.data.sources import MOST_PIXELS
from flashdit.shared.registry import check_finite

MOST_SIDES = 1000
DrawWhole = Callable[[int, int], int]
"""Draws a whole number between two, both among them."""


@dataclass(kw_only=True)
class ObjectAugmentation:
    """Options of how images and objects are changed; the defaults are those of DETR and of the Iwin paper."""

    hflip: float = 0.5
    """How often an image is mirrored."""
    short_sides: list[int] = field(default_factory=lambda: [*range(480, 801, 32)])
    """Shorter sides in pixels that images are resized to; an empty list leaves their size."""
    long_side: int = 1333
    """Of the longer side at most, in pixels, which then decides."""
    crop_prob: float = 0.5
    """How often a part is cut out before, of the image at one of `crop_short_sides`."""
    crop_short_sides: list[int] = field(default_factory=lambda: [400, 500, 600])
    """Shorter sides that an image is resized to before a part is cut out, the longer one at most
    `long_side`."""
    crop_range: tuple[int, int] = (384, 600)
    """Least and largest side of such a part, each drawn by itself; there may be no object in it."""

    def __post_init__(self):
        check_finite(self, "augmentation.")
        for name in ("hflip", "crop_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("short_sides", "crop_short_sides", "long_side", "crop_range"):
            given = getattr(self, name)
            sides = list(given) if isinstance(given, list | tuple) else [given]
            if len(sides) > MOST_SIDES or not all(1 <= side <= MOST_PIXELS for side in sides):
                raise ValueError(
                    f"augmentation.{name} must be sides in pixels from 1 to {MOST_PIXELS}, got {given}"
                )
        if self.crop_range[0] > self.crop_range[1]:
            raise ValueError(f"augmentation.crop_range must be least ≤ largest, got {list(self.crop_range)}")
        if self.crop_prob and not self.crop_short_sides:
            raise ValueError(
                "augmentation.crop_short_sides must have a side where crop_prob is above 0, got []"
            )


def augmented(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    masks: Tensor,
    options: ObjectAugmentation,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Returns `image` float32 (3, h, w) in 0 to 1, and `target` with the boxes, labels and masks left in it.

    Args:
        image: uint8 (3, H, W).
        boxes: float32 (n, 4): x1, y1, x2, y2 in pixels.
        labels: int64 (n,).
        masks: uint8 (n, H, W).
        options: Of the recipe.
        generator: What is drawn from, and nothing else.

    Source: the authors' configurations, in mmdetection's RandomFlip, AutoAugment of Resize and RandomCrop.
        Like theirs, images are resized without smoothing, masks to the nearest pixel, and an object stays as
        long as its box does, whatever is left of its mask.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def happens(share: float) -> bool:
        return float(torch.rand((), generator=generator)) < share

    size = (image.shape[-2], image.shape[-1])
    inputs: list[Any] = [
        tv_tensors.Image(image),
        tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),  # pyright: ignore[reportCallIssue]
        tv_tensors.Mask(masks),
    ]
    if happens(options.hflip):
        inputs = [F.horizontal_flip(x) for x in inputs]
    if happens(options.crop_prob):
        inputs = resized_objects(inputs, _one_of(options.crop_short_sides, draw), options.long_side)
        part = drawn_part(inputs[0].shape[-2:], options.crop_range, draw)
        inputs = [F.crop(x, *part) for x in inputs]
    if options.short_sides:
        inputs = resized_objects(inputs, _one_of(options.short_sides, draw), options.long_side)
    pixels, boxes, masks = (x.as_subclass(Tensor) for x in inputs)
    left = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    target = {"boxes": boxes[left], "labels": labels[left], "masks": masks[left]}
    return {"image": pixels.float() / 255, "target": target}


def _one_of(sides: Sequence[int], draw: DrawWhole) -> int:
    """Returns one of some sides."""
    return sides[draw(0, len(sides) - 1)]


def resized_objects(inputs: list[Any], short_side: int, long_side: int) -> list[Any]:
    """Returns an image, its boxes and its masks at the largest size of its form within two sides."""
    short, long = sorted(inputs[0].shape[-2:])
    factor = min(long_side / long, short_side / short)
    size = [max(1, int(side * factor + 0.5)) for side in inputs[0].shape[-2:]]
    return [F.resize(x, size, antialias=False) for x in inputs]


def drawn_part(size: Sequence[int], crop_range: Sequence[int], draw: DrawWhole) -> list[int]:
    """Returns top, left, height and width of a part of an image of a size.

    Args:
        size: Height and width.
        crop_range: Least and largest side, where the image has as much.
        draw: Of whole numbers.
    """
    least, largest = crop_range
    sides = [draw(min(side, least), min(side, largest)) for side in size]
    starts = [draw(0, side - part) for side, part in zip(size, sides, strict=True)]
    return [*starts, *sides]
