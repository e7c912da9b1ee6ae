"""Letters as distance fields, from the text fonts that matplotlib ships, by family."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from einops import rearrange, reduce
from PIL import Image, ImageDraw, ImageFont

LETTERS = ascii_uppercase
LETTER_NAMES = list(LETTERS)
TRAINING_FAMILIES = {
    "DejaVu Sans": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSans-BoldOblique",
    ),
    "DejaVu Sans Mono": (
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSansMono-Oblique",
        "DejaVuSansMono-BoldOblique",
    ),
    "DejaVu Serif": ("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    "Computer Modern Roman": ("cmr10", "cmb10", "cmti10", "cmmi10"),
}
"""Family → its faces, by file name without `.ttf`. The Display cuts of DejaVu hold no letters."""
HELD_OUT_FAMILIES = {
    "STIX General": ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    "Computer Modern Sans": ("cmss10",),
    "Computer Modern Typewriter": ("cmtt10",),
}
"""Families that no training image shows, with all their faces."""

FIELD_SIZE = 160
"""Side of a distance field, in its own pixels."""
EM = 96
"""Pixels of a field that one em takes: a letter and `FIELD_REACH` fit, the widest W included."""
FIELD_REACH = 8
"""Pixels of a field within which the distance to the outline is known."""
OVERSAMPLING = 4


@cache
def font_file(face: str) -> Path:
    """Returns the file of a face among matplotlib's fonts."""
    from matplotlib import get_data_path  # takes 0.3 s, which a run on other data need not wait for

    return Path(get_data_path(), "fonts", "ttf", f"{face}.ttf")


def letter_mask(face: str, letter: str, em: int, size: int) -> Image.Image:
    """Returns a letter, its ink centred: mode L, size × size pixels, 255 is ink.

    Args:
        face: File name without `.ttf`.
        letter: Of `LETTERS`.
        em: Font size in pixels.
        size: Side of the picture in pixels.
    """
    # The basic layout needs no Raqm, which not every build of Pillow has.
    font = ImageFont.truetype(font_file(face), em, layout_engine=ImageFont.Layout.BASIC)
    left, top, right, bottom = font.getbbox(letter)
    mask = Image.new("L", (size, size))
    corner = (size - (right - left)) // 2 - left, (size - (bottom - top)) // 2 - top
    ImageDraw.Draw(mask).text(corner, letter, fill=255, font=font)
    return mask


@cache
def distance_field(face: str, letter: str) -> tuple[Image.Image, tuple[int, int]]:
    """Returns how far each place lies inside a letter's outline, and the letter's (width, height).

    A field is sampled at any scale with sharp edges; another threshold makes strokes heavier or lighter.

    Returns:
        The field, mode L: 0 to 255 stands for −`FIELD_REACH` to `FIELD_REACH` pixels of the field, 127.5 for
        the outline. Width and height, in the same pixels, are of a box around the centre that holds the ink.

    Source: Green 2007, "Improved alpha-tested magnification for vector textures and special effects".
    """
    from scipy.ndimage import distance_transform_edt

    mask = letter_mask(face, letter, EM * OVERSAMPLING, FIELD_SIZE * OVERSAMPLING)
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    spans = [(low // OVERSAMPLING, -(-high // OVERSAMPLING)) for low, high in ((left, right), (top, bottom))]
    columns, rows = (
        slice(max(low - FIELD_REACH, 0), min(high + FIELD_REACH, FIELD_SIZE)) for low, high in spans
    )
    blocks = rearrange(np.asarray(mask) >= 128, "(h y) (w x) -> h w y x", y=OVERSAMPLING, x=OVERSAMPLING)
    ink = rearrange(blocks[rows, columns], "h w y x -> (h y) (w x)")  # beyond it all is out of reach
    to_ground, to_ink = (np.asarray(distance_transform_edt(part)) for part in (ink, ~ink))
    inside = np.where(ink, to_ground - 0.5, 0.5 - to_ink)  # the outline runs between two pixels' centres
    pixels = reduce(inside, "(h y) (w x) -> h w", "mean", y=OVERSAMPLING, x=OVERSAMPLING) / OVERSAMPLING
    levels = np.zeros((FIELD_SIZE, FIELD_SIZE), np.uint8)
    levels[rows, columns] = (pixels / FIELD_REACH * 127.5 + 127.5).round().clip(0, 255)
    width, height = (2 * max(FIELD_SIZE // 2 - low, high - FIELD_SIZE // 2) for low, high in spans)
    return Image.fromarray(levels), (width, height)
