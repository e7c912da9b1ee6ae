"""Which RGB pixels does an opened image file stand for, whatever its mode, depth and kind of transparency?"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from flashdit.data.tiff import GreyNumbers, grey_numbers, prepare_tiff

ORIENTATION = 0x0112  # of EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What stands an image upright, by its orientation."""
BITFIELDS, LONGEST_WITHOUT_ALPHA = 3, 52  # of a BMP: compression, and bytes of the header


class DecodedImage(NamedTuple):
    """The pixels of an image file."""

    picture: Image.Image
    """Upright RGB, 8 bits a channel."""
    transparent: bool
    """Whether the background shows through any pixel."""
    animated: bool
    """Whether the file has frames after this one."""


def decode(file: ImageFile, background: tuple[int, int, int]) -> DecodedImage:
    """Returns the pixels of a file of which only the head has been read; of several frames the first.

    Raises:
        ValueError: If its numbers are out of range, or its kind has no right way.
        Exception: Of any kind, as Pillow's decoders raise on a broken file.
    """
    pixels, animated = _pixels(file), _has_more_frames(file)
    method = UPRIGHT.get(_orientation(file))
    if method is not None:
        pixels = pixels.transpose(method)
    if pixels.mode == "RGB":
        return DecodedImage(pixels, False, animated)
    canvas = Image.new("RGBA", pixels.size, (*background, 255))
    canvas.alpha_composite(pixels)
    opaque = pixels.getchannel("A").histogram()[255]
    return DecodedImage(canvas.convert("RGB"), opaque < pixels.width * pixels.height, animated)


def _has_more_frames(file: ImageFile) -> bool:
    """Returns whether a decoded file has a frame, or a page, after its first; False where that is broken.

    What a telephone keeps beside a photograph in one JPEG (MPO: a preview, a map of brightness) is none.
    """
    try:
        return file.format != "MPO" and getattr(file, "is_animated", False)
    except Exception:  # whatever Pillow raises
        return False


def _orientation(file: ImageFile) -> int:
    """Returns the orientation of a decoded file; 1, as it is stored, where its EXIF is broken."""
    try:
        return file.getexif().get(ORIENTATION, 1)
    except Exception:  # whatever Pillow raises
        return 1


def _pixels(file: ImageFile) -> Image.Image:
    """Returns the pixels of a file as they are stored, as RGB or RGBA."""
    numbers = GreyNumbers()
    if isinstance(file, TiffImageFile):
        prepare_tiff(file)
        numbers = grey_numbers(file)
    if isinstance(file, BmpImageFile):
        _check_bmp(file)
    _, box, _, layout = file.tile[0] if file.tile else (None, None, None, None)
    file.load()
    image: Image.Image = file
    if file.mode[0] in "IF" or (file.mode == "L" and numbers.kind == "signed"):
        image = _scaled_grey(file, numbers)
    elif file.format == "PNG" and "transparency" in file.info:
        image = _with_own_key(file, layout)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if file.format == "GIF" and box != (0, 0, *file.size):  # a first frame that leaves some of the screen
        canvas = Image.new("RGBA", file.size)
        canvas.paste(image.crop(box), box)
        return canvas
    return image


def _check_bmp(file: Any) -> None:
    """Raises ValueError for a BMP of 16 bits with alpha, which Pillow ignores."""
    file.fp.seek(14)
    header = file.fp.read(56)
    bits, compression = int.from_bytes(header[14:16], "little"), int.from_bytes(header[16:20], "little")
    if bits == 16 and compression == BITFIELDS and header[0] > LONGEST_WITHOUT_ALPHA and any(header[52:56]):
        raise ValueError("BMP of 16 bits with alpha is not read: convert it to PNG")


def _scaled_grey(image: Image.Image, numbers: GreyNumbers) -> Image.Image:
    """Returns grey of other than 8 unsigned bits as such; with alpha where one value is transparent."""
    values = np.asarray(image)
    if numbers.kind != "floating-point" and numbers.bits in (8, 32):  # Pillow has no int8 and no uint32
        values = values.view(f"{'i' if numbers.kind == 'signed' else 'u'}{numbers.bits // 8}")
    low, high = float(values.min()), float(values.max())
    white = numbers.white(high)
    if not (low >= 0 and high <= white):  # also NaN
        kind = "floating-point" if numbers.kind == "floating-point" else "integer"
        raise ValueError(f"{kind} grey values must be from 0 to {white:,.0f}, got {low:g} to {high:g}")
    scaled = (values.astype(np.float32) * np.float32(255 / white)).round().astype(np.uint8)
    grey = Image.fromarray(255 - scaled if numbers.white_is_zero else scaled)
    key = image.info.get("transparency")
    return grey if key is None else _with_alpha(grey, values == key)


def _with_own_key(file: ImageFile, layout: Any) -> Image.Image:
    """Returns a PNG whose one transparent colour is compared in the depth that the file has."""
    key = file.info["transparency"]
    if layout in ("L;2", "L;4"):
        largest = 2 ** int(layout[-1]) - 1
        file.info["transparency"] = (key & largest) * 255 // largest
    if layout != "RGB;16B":
        return file
    again: Any
    with Image.open(file.filename, formats=["PNG"]) as again:
        name, box, offset, _ = again.tile[0]
        again.tile = [(name, box, offset, "RGB;16L")]  # the lower bytes: Pillow keeps the upper ones alone
        values = np.asarray(file).astype(np.uint16) << 8 | np.asarray(again)
    del file.info["transparency"]
    return _with_alpha(file, (values == np.array(key)).all(-1))


def _with_alpha(image: Image.Image, transparent: np.ndarray) -> Image.Image:
    """Returns a grey or RGB image with alpha, 0 where it is transparent (h, w)."""
    alpha = Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8))
    return Image.merge(f"{image.mode}A", (*image.split(), alpha))
