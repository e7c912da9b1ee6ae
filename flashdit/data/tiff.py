"""Which TIFF files does Pillow decode wrongly? They are decoded by other means, or refused by their kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from PIL import ImagePalette
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

# Tags of TIFF 6.0
WIDTH, LENGTH, BITS, PHOTOMETRIC = 256, 257, 258, 262
SAMPLES, PLANES, COLOUR_MAP, SAMPLE_FORMAT = 277, 284, 320, 339
SEPARATE = 2  # of PLANES
WHITE_IS_ZERO, YCBCR = 0, 6  # of PHOTOMETRIC
NUMBERS = {1: "unsigned", 2: "signed", 3: "floating-point"}  # of SAMPLE_FORMAT
NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}
CONVERTIBLE = "8- or 16-bit grey, RGB or RGBA"


class GreyNumbers(NamedTuple):
    """What the numbers of a grey image stand for."""

    bits: int = 16
    kind: str = "unsigned"
    """One of `NUMBERS`."""
    white_is_zero: bool = False

    def white(self, largest: float) -> float:
        """Returns the number of white, or of black where white is zero; of an image with a largest one."""
        if self.kind == "floating-point":
            return 1.0
        if self.bits == 32 and largest <= 65535:
            return 65535.0
        return 2.0 ** (self.bits - (self.kind == "signed")) - 1


def grey_numbers(file: TiffImageFile) -> GreyNumbers:
    """Returns what the numbers of a grey TIFF stand for."""
    tags = file.tag_v2
    kind = NUMBERS[tags.get(SAMPLE_FORMAT, (1,))[0]]
    return GreyNumbers(tags.get(BITS, (1,))[0], kind, tags[PHOTOMETRIC] == WHITE_IS_ZERO)


def prepare_tiff(file: Any) -> None:
    """Has an opened TIFF, of Pillow's class, decoded right where Pillow would not do so by itself.

    Pillow's own decoder takes planes of 16 bits for bytes and YCbCr for RGB, which libtiff's does not; of
    libtiff's numbers in the machine's order it takes some for those of the file's order.

    Raises:
        ValueError: If Pillow has no right way for its kind.
    """
    tags = file.tag_v2
    if PHOTOMETRIC not in tags:
        raise ValueError("a TIFF must tell what its numbers stand for, it has no PhotometricInterpretation")
    separate, samples = tags.get(PLANES) == SEPARATE, tags.get(SAMPLES, 1)
    if separate and samples > 1 and file.mode not in ("RGB", "RGBA", "CMYK"):
        raise ValueError(f"TIFF of {file.mode} in separate planes is not read: convert it to {CONVERTIBLE}")
    if separate and samples == 1:  # Pillow takes one letter of its layout's name for each plane
        tags[PLANES] = 1
        file._setup()
    elif not file.use_load_libtiff and (separate or (tags[PHOTOMETRIC] == YCBCR and file.mode == "RGB")):
        layout = "RGBX" if tags[PHOTOMETRIC] == YCBCR else file.mode
        _decode_by_libtiff(file, f"{layout};16N" if tags[BITS][0] == 16 else layout)
    if file.use_load_libtiff and file.tile[0][3][0] in NATIVE:
        _decode_by_libtiff(file, NATIVE[file.tile[0][3][0]])
    if COLOUR_MAP in tags and max(tags[COLOUR_MAP]) < 256:  # of 8 bits, not 16: libtiff's rule
        file.palette = ImagePalette.raw("RGB;L", bytes(tags[COLOUR_MAP]))


def _decode_by_libtiff(file: Any, layout: str) -> None:
    """Has a file decoded by libtiff, whose numbers have a layout by Pillow's name."""
    tags = file.tag_v2
    arguments = layout, file.info["compression"], False, tags.offset
    file.tile = [("libtiff", (0, 0, tags[WIDTH], tags[LENGTH]), 0, arguments)]
    file.use_load_libtiff = True


def unknown_tiff(path: Path) -> str:
    """Returns the kind of a TIFF that Pillow has no mode for, in words; nothing for any other file."""
    try:
        with path.open("rb") as file:
            tags = ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
        kind = NUMBERS.get(tags.get(SAMPLE_FORMAT, (1,))[0], "undefined")
        order = "little-endian" if tags.prefix == b"II" else "big-endian"
        about = f"{kind}, {order}, photometric interpretation {tags.get(PHOTOMETRIC, 'missing')}"
        channels = f"{tags.get(SAMPLES, 1)} × {tags[BITS][0]} bits"
        return f"TIFF of {channels} ({about}) is not read: convert it to {CONVERTIBLE}"
    except Exception:  # whatever Pillow raises for a file that is no TIFF, or a broken one
        return ""
