"""Images for people: PNG files with text, grids of labelled images, panels with heads and a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, uint8

MIN_CELL = 64
GAP = 6
FONT_SIZE = 15
NAMED_SAMPLES = 5  # samples that a message names


class InvalidPixels(ValueError):
    """Raised instead of making a picture of values that stand for none.

    Args:
        rule: What they must be.
        rows: Which of a batch are not.
        ids: The numbers of the batch's samples; None counts them from 0.
        hint: Where the reader of the message should look.
    """

    def __init__(self, rule: str, rows: Sequence[int], ids: Sequence[int] | None, hint: str):
        names = [str(row if ids is None else ids[row]) for row in rows[:NAMED_SAMPLES]]
        others = f" and {len(rows) - NAMED_SAMPLES:,} more" if len(rows) > NAMED_SAMPLES else ""
        samples = "sample" if len(rows) == 1 else "samples"
        super().__init__(f"{rule}, got others in {samples} {', '.join(names)}{others}: {hint}")


def invalid_rows(values: Tensor, most: float = math.inf) -> list[int]:
    """Returns which rows of (B, …) hold a value that is not finite, or larger than `most` in size."""
    wrong = ~values.isfinite() | (values.abs() > most)
    return wrong.flatten(1).any(1).nonzero().flatten().tolist()


def check_pixels(pixels: Tensor, ids: Sequence[int] | None = None) -> None:
    """Raises InvalidPixels for decoded images (B, 3, H, W) that are not finite; `ids` are their numbers."""
    rows = invalid_rows(pixels)
    if rows:
        hint = "their latents are finite, so look at the autoencoder's weights and dtype"
        raise InvalidPixels("pixels must be finite", rows, ids, hint)


def to_uint8(pixels: Tensor, ids: Sequence[int] | None = None) -> Tensor:
    """Returns images as bytes, clipped: (B, 3, H, W) from −1 to 1 → uint8.

    Args:
        pixels: Decoded images.
        ids: The numbers of the samples, for the message; None counts them from 0.

    Raises:
        InvalidPixels: If a value is not finite.
    """
    check_pixels(pixels, ids)
    return (pixels * 127.5 + 128).clamp(0, 255).to(uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Returns a PIL image of uint8 (3, H, W)."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def save_png(image: Tensor, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Writes uint8 (3, H, W) as a PNG, with text chunks where `about` gives some."""
    to_pil(image).save(path, pnginfo=png_text(about or {}))


def png_text(about: Mapping[str, str]) -> PngInfo:
    """Returns text chunks for a PNG."""
    info = PngInfo()
    for key, value in about.items():
        info.add_text(key, value)
    return info


@cache
def label_font() -> ImageFont.FreeTypeFont:
    """Returns the font of what is written beside pictures: DejaVu Sans, which matplotlib brings.

    It has Latin, Greek, Cyrillic, Armenian, Georgian, Hebrew and Arabic letters.
    """
    return ImageFont.truetype(_font_file(), FONT_SIZE)


@cache
def _letters() -> frozenset[int]:
    """Returns the code points of the letters that the font has."""
    return frozenset(FT2Font(str(_font_file())).get_charmap())


def _font_file() -> Path:
    """Returns where matplotlib keeps the font."""
    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def labelled_grid(rows: Sequence[tuple[str, Sequence[Tensor]]], title: str = "") -> Image.Image:
    """Returns a grid with a label before each row; small images are enlarged to 64 pixels.

    Args:
        rows: (label, images uint8 (3, H, W)) for each row.
        title: A line above the grid, empty for none.
    """
    height, width = rows[0][1][0].shape[1:]
    scale = max(1, -(-MIN_CELL // max(height, width)))
    size = (width * scale, height * scale)
    panels = [
        (label, [to_pil(image).resize(size, Image.Resampling.BICUBIC) for image in images])
        for label, images in rows
    ]
    return panel_grid(panels, title=title, gap=2)


def panel_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    heads: Sequence[str] = (),
    *,
    title: str = "",
    legend: Image.Image | None = None,
    gap: int = GAP,
) -> Image.Image:
    """Returns panels of one size in rows: title, a head above each column, a label before each row, legend.

    Args:
        rows: (label, panels) for each row.
        heads: One per column, or none.
        title: The line at the top, empty for none.
        legend: Placed below.
        gap: Pixels between panels.
    """
    font = label_font()

    def width_of(text: str) -> int:
        return math.ceil(font.getlength(text)) + 2 * GAP if text else 0

    cell_width, cell_height = rows[0][1][0].size
    cell_width = max([cell_width, *(width_of(head) - 2 * GAP for head in heads)]) + gap
    cell_height += gap
    left = max([gap, *(width_of(label) for label, _ in rows)])
    title_height, head_height = (2 * FONT_SIZE if shown else 0 for shown in (title, heads))
    top = max(gap, title_height + head_height)
    bottom = top + len(rows) * cell_height
    columns = max(len(panels) for _, panels in rows)
    widths = (left + columns * cell_width, width_of(title), left + legend.width + gap if legend else 0)
    canvas = Image.new("RGB", (max(widths), bottom + (legend.height + gap if legend else 0)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, FONT_SIZE), title, "black", font, anchor="lm")
    for column, head in enumerate(heads):
        draw.text((left + column * cell_width, top - FONT_SIZE), head, "black", font, anchor="lm")
    for row, (label, panels) in enumerate(rows):
        y = top + row * cell_height
        draw.text((GAP, y + cell_height / 2), label, "black", font, anchor="lm")
        for column, panel in enumerate(panels):
            canvas.paste(panel, (left + column * cell_width, y))
    if legend:
        canvas.paste(legend, (left, bottom))
    return canvas


def rows_by_class(images: Tensor, labels: Tensor, names: Sequence[str], columns: int) -> list:
    """Returns the rows of a labelled grid: each class on rows of its own, `columns` images wide.

    Args:
        images: uint8 (N, 3, H, W).
        labels: (N,).
        names: One per class; one with letters that the font lacks, such as Chinese ones, is shown as its
            number.
        columns: Images in a row at the most.
    """
    rows = []
    for label in labels.unique().tolist():
        name = names[label] if _letters().issuperset(map(ord, names[label])) else f"class {label}"
        for number, chunk in enumerate(images[labels == label].split(columns)):
            rows.append((name if number == 0 else "", list(chunk)))
    return rows
