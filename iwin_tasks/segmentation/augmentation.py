"""How images and their labels are changed together: mmsegmentation's recipe, drawn from one generator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from flashdit.data.sources import MOST_PIXELS
from flashdit.shared.registry import check_finite
from iwin_tasks.segmentation.heads import resized

CROP_TRIES = 10
BRIGHTNESS = 32 / 255
"""Largest change either way, of channels from 0 to 1."""
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18 / 180
"""Largest turn either way, as a share of the circle."""
Between = Callable[[float, float], float]
"""Draws a number between two."""


@dataclass(kw_only=True)
class PixelAugmentation:
    """Options of how images and labels are resized and changed; the defaults are the Iwin paper's recipe."""

    scale: tuple[int, int] | None = (2048, 512)
    """Longest and shortest side that an image is resized to fit, its form kept; None leaves its size."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Least and largest factor of that size in training."""
    crop: tuple[int, int] | None = (512, 512)
    """Height and width of a training image: cut out, or filled up at the right and below; None takes the
    image as it is, and all must then be of one size."""
    cat_max_ratio: float = 0.75
    """A crop is drawn again, ten times at most, while one class has this share of its pixels or more."""
    hflip: float = 0.5
    """How often an image is mirrored."""
    photometric: float = 0.5
    """How often each of brightness, contrast, saturation and hue is changed."""

    def __post_init__(self):
        check_finite(self, "augmentation.")
        for name in ("hflip", "photometric"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 < self.cat_max_ratio <= 1:
            raise ValueError(
                f"augmentation.cat_max_ratio must be above 0 and at most 1, got {self.cat_max_ratio}"
            )
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"augmentation.ratio must be 0 < least ≤ largest, got {low} and {high}")
        for name in ("scale", "crop"):
            sides = getattr(self, name)
            if sides is not None and not 1 <= min(sides) <= max(sides) <= MOST_PIXELS:
                raise ValueError(
                    f"augmentation.{name} must be two sides from 1 to {MOST_PIXELS}, got {list(sides)}"
                )


def train_pair(
    image: Tensor, labels: Tensor, options: PixelAugmentation, ignore: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns an augmented, normalised image float32 (3, h, w) and its labels int64 (h, w).

    Args:
        image: uint8 (3, H, W).
        labels: Classes or `ignore`, int64 (H, W).
        options: Of the recipe.
        ignore: What labels are where a crop is filled up.
        generator: What is drawn from, and nothing else.

    Source: mmsegmentation 0.11's Resize, RandomCrop, RandomFlip, PhotoMetricDistortion, Normalize and Pad.
    """

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    pixels, classes = tv_tensors.Image(image), tv_tensors.Mask(labels)
    size = scaled_size(image.shape[-2:], options.scale, between(*options.ratio))
    pixels, classes = resized_pixels(pixels, size), F.resize(classes, size)
    if options.crop is not None:
        pixels, classes = crop_pair(pixels, classes, options, ignore, between)
    if between(0, 1) < options.hflip:
        pixels, classes = F.horizontal_flip(pixels), F.horizontal_flip(classes)
    pixels = normalised(distort(F.to_dtype(pixels, torch.float32, scale=True), options.photometric, between))
    if options.crop is not None:  # after normalising, so that what is filled up is 0
        missing = [side - have for side, have in zip(options.crop, pixels.shape[-2:], strict=True)]
        padding = [0, 0, missing[1], missing[0]]  # left, top, right, bottom
        pixels, classes = F.pad(pixels, padding), F.pad(classes, padding, fill=ignore)
    return pixels.as_subclass(Tensor), classes.as_subclass(Tensor)


def held_out_image(image: Tensor, scale: tuple[int, int] | None) -> Tensor:
    """Returns an image as a model is tested on it: uint8 (3, H, W) → resized, normalised float32 (3, h, w).

    Args:
        image: Of any size.
        scale: As in `PixelAugmentation`.
    """
    pixels = resized_pixels(tv_tensors.Image(image), scaled_size(image.shape[-2:], scale))
    return normalised(F.to_dtype(pixels, torch.float32, scale=True)).as_subclass(Tensor)


def scaled_size(
    size: tuple[int, ...] | torch.Size, scale: tuple[int, int] | None, ratio: float = 1.0
) -> list[int]:
    """Returns the largest height and width of an image's form that fit into `scale` times `ratio`."""
    factor = ratio
    if scale is not None:
        factor *= min(max(scale) / max(size), min(scale) / min(size))
    return [max(1, int(side * factor + 0.5)) for side in size]


def resized_pixels(pixels: Tensor, size: list[int]) -> Tensor:
    """Returns an image uint8 at a size, bilinear without smoothing, as mmsegmentation's OpenCV has it.

    torch's own resizing of bytes is up to a level off.
    """
    return tv_tensors.Image(resized(pixels[None].float(), size)[0].round().to(torch.uint8))


def crop_pair(
    pixels: Tensor, classes: Tensor, options: PixelAugmentation, ignore: int, between: Between
) -> tuple[Tensor, Tensor]:
    """Returns a piece of an image and its labels, at most `crop` large, in which no class has too much."""
    assert options.crop is not None
    height, width = (min(side, have) for side, have in zip(options.crop, classes.shape, strict=True))
    rows, columns = (have - side + 1 for have, side in zip(classes.shape, (height, width), strict=True))
    top = left = 0
    for _ in range(CROP_TRIES):
        top, left = int(between(0, rows)), int(between(0, columns))
        part = classes[top : top + height, left : left + width]
        counts = part[part != ignore].unique(return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < options.cat_max_ratio:
            break
    box = [top, left, height, width]
    return F.crop(pixels, *box), F.crop(classes, *box)


def distort(pixels: Tensor, share: float, between: Between) -> Tensor:
    """Returns an image (3, H, W) from 0 to 1 with another brightness, contrast, saturation and hue.

    Differs from mmsegmentation, which multiplies HSV's saturation: here a pixel moves from or to its grey.
    Nothing is rounded in between.

    Args:
        pixels: The image.
        share: How often each of the four is changed.
        between: Draws a number.
    """

    def changed(x: Tensor, change: Callable[[Tensor, float], Tensor], low: float, high: float) -> Tensor:
        return change(x, between(low, high)) if between(0, 1) < share else x

    contrast_first = between(0, 1) < 0.5
    x = changed(pixels, lambda x, d: (x + d).clamp(0, 1), -BRIGHTNESS, BRIGHTNESS)
    if contrast_first:
        x = changed(x, F.adjust_brightness, *CONTRAST)  # a factor, which there is called contrast
    x = changed(x, F.adjust_saturation, *SATURATION)
    x = changed(x, F.adjust_hue, -HUE, HUE)
    return x if contrast_first else changed(x, F.adjust_brightness, *CONTRAST)


def normalised(pixels: Tensor) -> Tensor:
    """Returns an image (3, H, W) from 0 to 1 with ImageNet's mean and deviation taken out."""
    return F.normalize(pixels, mean=list(IMAGENET_DEFAULT_MEAN), std=list(IMAGENET_DEFAULT_STD))
