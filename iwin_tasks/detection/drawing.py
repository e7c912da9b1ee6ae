"""Pictures of detections: boxes, masks and names on the image."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from flashdit.shared.pictures import FONT_SIZE, label_font, to_pil

LEAST_DRAWN = 384
"""Longer side of a picture in pixels: smaller images are enlarged by a whole number."""
GOLDEN = 0.618034  # of a turn of the hue from one label to the next
MASK_ALPHA = 0.5


def label_colour(label: int) -> tuple[int, int, int]:
    """Returns a label's colour, red, green and blue."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.85, 1.0)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_objects(image: Tensor, found: Mapping[str, Tensor], names: Sequence[str]) -> Image.Image:
    """Returns an image with its objects drawn on it.

    Args:
        image: uint8 (3, H, W).
        found: `boxes` (n, 4), `labels` (n,) and `masks` (n, H, W), and `scores` (n,) where there are some.
        names: Of the labels.
    """
    scale = max(1, -(-LEAST_DRAWN // max(image.shape[-2:])))
    image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    labels = found["labels"].tolist()
    if not labels:
        return to_pil(image)
    colours: list[Any] = [label_colour(label) for label in labels]
    masks = F.interpolate(found["masks"][None].float(), scale_factor=scale)[0] > 0
    image = draw_segmentation_masks(image, masks, MASK_ALPHA, colours)
    texts = [names[int(label)] for label in labels]
    if "scores" in found:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, found["scores"].tolist(), strict=True)]
    drawn = draw_bounding_boxes(
        image,
        found["boxes"] * scale,
        texts,
        colours,
        width=2,
        font=str(label_font().path),
        font_size=FONT_SIZE,
        label_colors="black",
        fill_labels=True,
    )
    return to_pil(drawn)


def on_one_size(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Returns pictures on white ground of the largest width and height among them, each at the top left."""
    size = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    grounds = [Image.new("RGB", size, "white") for _ in pictures]
    for ground, picture in zip(grounds, pictures, strict=True):
        ground.paste(picture)
    return grounds
