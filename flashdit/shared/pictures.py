"""Images as people look at them: PNG files and labelled grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

MIN_CELL = 64
GAP = 2
FONT_SIZE = 15


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


def labelled_grid(rows: Sequence[tuple[str, Sequence[Tensor]]], title: str = "") -> Image.Image:
    """Returns a grid with a label before each row; small images are enlarged to 64 pixels.

    Args:
        rows: (label, images uint8 (3, H, W)) for each row.
        title: A line above the grid, empty for none.
    """
    height, width = rows[0][1][0].shape[1:]
    scale = max(1, -(-MIN_CELL // max(height, width)))
    cell_width, cell_height = width * scale + GAP, height * scale + GAP
    font = ImageFont.load_default(FONT_SIZE)
    left = max((int(font.getlength(label)) + 12 for label, _ in rows if label), default=GAP)
    top = 2 * FONT_SIZE if title else GAP
    columns = max(len(images) for _, images in rows)
    size = (max(left + columns * cell_width, int(font.getlength(title)) + 12), top + len(rows) * cell_height)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((6, top / 2), title, "black", font, anchor="lm")
    for row, (label, images) in enumerate(rows):
        y = top + row * cell_height
        draw.text((6, y + cell_height / 2), label, "black", font, anchor="lm")
        for column, image in enumerate(images):
            enlarged = to_pil(image).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (left + column * cell_width, y))
    return canvas


def rows_by_class(images: Tensor, labels: Tensor, names: Sequence[str], columns: int) -> list:
    """Returns the rows of a labelled grid: each class on rows of its own, `columns` images wide.

    Args:
        images: uint8 (N, 3, H, W).
        labels: (N,).
        names: One per class.
        columns: Images in a row at the most.
    """
    rows = []
    for label in labels.unique().tolist():
        for number, chunk in enumerate(images[labels == label].split(columns)):
            rows.append((names[label] if number == 0 else "", list(chunk)))
    return rows
