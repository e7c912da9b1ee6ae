"""A small folder of pictures that are hard to read: for tests and documentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ["2 discs", "10 squares", "formes"]
READABLE = 12
EXIF_ORIENTATION = 0x0112


def disc(side: int = 48, colour: tuple[int, ...] = (220, 30, 40, 255)) -> Image.Image:
    """Returns an RGBA disc on transparent pixels whose hidden colour is green."""
    picture = Image.new("RGBA", (side, side), (0, 255, 0, 0))
    ImageDraw.Draw(picture).ellipse((side // 6, side // 6, side - side // 6, side - side // 6), fill=colour)
    return picture


def square(width: int, height: int, colour: tuple[int, ...] = (30, 60, 200)) -> Image.Image:
    """Returns a square in a corner: what is upright can be seen."""
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).rectangle((0, 0, width // 2, height // 3), fill=colour)
    return picture


def sideways(picture: Image.Image, path: Path) -> None:
    """Saves a picture lying on its side, with EXIF orientation 6, which says so."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # turn clockwise by 90° to see it upright
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def make_hard_pictures(root: Path) -> Path:
    """Writes three classes, twelve pictures, a broken one and what is no data; returns the folder."""
    discs, squares, shapes = (root / name for name in CLASSES)
    for folder in (discs, squares, shapes / "deeper", root / "__MACOSX", root / ".cache"):
        folder.mkdir(parents=True)
    disc().save(discs / "rgba.png")
    disc(colour=(220, 30, 40, 128)).save(discs / "half.webp", lossless=True)
    disc().convert("P").save(discs / "palette.png", transparency=disc().convert("P").getpixel((0, 0)))
    disc(30).convert("LA").save(discs / "grey alpha.png")
    disc().save(discs / "animated.gif", save_all=True, append_images=[disc(colour=(0, 0, 255, 255))])
    ramp = np.linspace(0, 65535, 48 * 40).reshape(40, 48).astype(np.uint16)
    Image.fromarray(ramp).save(squares / "sixteen.png")
    square(40, 60).convert("L").save(squares / "grey.JPG", quality=95)
    square(40, 60).convert("CMYK").save(squares / "cmyk.jpg", quality=95)
    sideways(square(40, 60), squares / "phone.jpg")
    square(33, 57).convert("1").save(squares / "one bit.tif")
    square(300, 70).save(shapes / "deeper" / "größe 絵.bmp")
    square(20, 21).save(shapes / "small.png")
    data = (discs / "rgba.png").read_bytes()
    (shapes / "broken.png").write_bytes(data[: len(data) // 2])
    (shapes / "notes.txt").write_text("no picture")
    square(9, 9).save(root / "loose.png")
    square(9, 9).save(root / "__MACOSX" / "hidden.png")
    square(9, 9).save(root / ".cache" / "hidden.png")
    (discs / "._rgba.png").write_bytes(b"resource fork")
    return root
