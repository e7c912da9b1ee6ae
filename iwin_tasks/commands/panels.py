"""Panels and legends of maps: values to colours, colours to pictures; and photographs as tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from flashdit.data.images import find_images, read_image, report_images
from flashdit.shared.pictures import FONT_SIZE, GAP, label_font

STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, every quarter


def colours(values: Tensor) -> Tensor:
    """Returns uint8 (h, w, 3) for values (h, w) in [0, 1], from dark violet to yellow."""
    stops = torch.tensor(STOPS, dtype=torch.float32)
    place = values.float().clamp(0, 1) * (len(stops) - 1)
    low = place.floor().long().clamp(max=len(stops) - 2)
    share = (place - low)[..., None]
    return (stops[low] * (1 - share) + stops[low + 1] * share).round().to(torch.uint8)


def to_picture(pixels: Tensor, height: int) -> Image.Image:
    """Returns uint8 (h, w, 3) enlarged to about `height` rows by whole pixels; never made smaller."""
    rows, columns = pixels.shape[:2]
    scale = max(1, round(height / rows))
    picture = Image.frombytes("RGB", (columns, rows), bytes(pixels.flatten().tolist()))
    return picture.resize((columns * scale, rows * scale), Image.Resampling.NEAREST)


def colour_bar(low: str, middle: str, high: str, width: int = 240) -> Image.Image:
    """Returns the scale of `colours` with the names of its two ends and its middle below."""
    font = label_font()
    bar = to_picture(colours(torch.linspace(0, 1, width).expand(12, width)), 12)
    canvas = Image.new("RGB", (width + 120, 16 + 2 * FONT_SIZE), "white")
    canvas.paste(bar, (0, 4))
    draw = ImageDraw.Draw(canvas)
    for place, name, anchor in ((0, low, "lt"), (width / 2, middle, "mt"), (width, high, "mt")):
        draw.text((place, 22), name, "black", font, anchor=anchor)
    return canvas


def colour_key(names: Sequence[tuple[tuple[int, int, int], str]]) -> Image.Image:
    """Returns a line of coloured squares, each with what it stands for."""
    font = label_font()
    widths = [math.ceil(font.getlength(name)) + FONT_SIZE + 4 * GAP for _, name in names]
    canvas = Image.new("RGB", (sum(widths), FONT_SIZE + 2 * GAP), "white")
    draw = ImageDraw.Draw(canvas)
    x = 0
    for (colour, name), width in zip(names, widths, strict=True):
        draw.rectangle((x, GAP, x + FONT_SIZE, GAP + FONT_SIZE), fill=colour)
        draw.text((x + FONT_SIZE + GAP, GAP + FONT_SIZE / 2), name, "black", font, anchor="lm")
        x += width
    return canvas


def read_photographs(folder: Path, size: tuple[int, int], at_most: int) -> Tensor:
    """Returns the folder's first images in name order, cropped to the centre: float (N, 3, H, W) in [0, 1].

    Args:
        folder: Of images, as `find_images` takes it.
        size: H and W.
        at_most: How many to read.

    Raises:
        ValueError: If the folder does not exist or holds no image, or one cannot be read.
    """
    found = find_images(folder, called="images")
    report_images(found.describe(), found.unreadable)
    height, width = size
    images = []
    for path in found.paths[:at_most]:
        fitted = ImageOps.fit(read_image(path), (width, height), Image.Resampling.BICUBIC)
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        images.append(pixels.reshape(height, width, 3).permute(2, 0, 1) / 255)
    return torch.stack(images)
