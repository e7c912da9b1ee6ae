"""Label maps for people: each class in its colour, over the picture or alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashdit.shared.pictures import MIN_CELL, panel_grid, to_pil

OPACITY = 0.6
IGNORED_COLOUR = 255  # white
MOST_COLOURS = 256
STEPS = (2**25 - 1, 2**15 - 1, 2**21 - 1)
"""Of red, green and blue from one class to the next, modulo 255; class 0 is black. As torchvision has it."""


def class_colours(num_classes: int) -> Tensor:
    """Returns a colour for each class, uint8 (K, 3)."""
    numbers = torch.arange(num_classes)[:, None] * torch.tensor(STEPS)
    return (numbers % 255).to(torch.uint8)


def over_picture(image: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Returns a picture with a label map over it, uint8 (3, H, W).

    Args:
        image: uint8 (3, H, W).
        classes: (H, W) int64; what is no class is white.
        num_classes: K.
    """
    white = torch.full((1, 3), IGNORED_COLOUR, dtype=torch.uint8)
    colours = torch.cat([class_colours(num_classes), white])
    is_class = (classes >= 0) & (classes < num_classes)
    shown = colours[torch.where(is_class, classes, num_classes)].permute(2, 0, 1)
    return torch.lerp(image.float(), shown.float(), OPACITY).round().to(torch.uint8)


def side_by_side(
    rows: Sequence[tuple[Tensor, Tensor, Tensor]], num_classes: int, title: str = ""
) -> Image.Image:
    """Returns rows of an image, its truth and what was predicted; small images are enlarged.

    Args:
        rows: (image uint8 (3, H, W), labels (H, W), predicted classes (H, W)) for each row, all of one size.
        num_classes: K.
        title: The line at the top.
    """
    height, width = rows[0][0].shape[1:]
    scale = max(1, -(-MIN_CELL // max(height, width)))
    panels = [
        (
            "",
            [
                to_pil(x).resize((width * scale, height * scale), Image.Resampling.NEAREST)
                for x in (image, *(over_picture(image, c, num_classes) for c in both))
            ],
        )
        for image, *both in rows
    ]
    return panel_grid(panels, ("image", "truth", "prediction"), title=title)


def label_image(classes: Tensor, num_classes: int) -> Image.Image:
    """Returns classes (H, W) as a picture to be written: its numbers are the classes, shown in their colours.

    Args:
        classes: int64.
        num_classes: K; above 256 the numbers have 16 bits, and no colours.
    """
    if num_classes > MOST_COLOURS:
        return Image.fromarray(classes.numpy().astype(np.uint16))
    picture = Image.fromarray(classes.numpy().astype(np.uint8))
    picture.putpalette(class_colours(num_classes).flatten().tolist())
    return picture
