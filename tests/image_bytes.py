"""Image files made byte by byte, from the texts of their formats: kinds that no library at hand writes."""

from __future__ import annotations

import struct
import zlib

import numpy as np

PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
"""Of an interlaced PNG: first row and column, and the steps to the next ones."""


def packed(values: np.ndarray, bits: int) -> bytes:
    """Returns rows of values of less than 8 bits, the first in the upper bits, each row in whole bytes."""
    split = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(split.reshape(len(values), -1).astype(np.uint8), axis=1).tobytes()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    values: np.ndarray, bits: int, colour: int, key: tuple[int, ...] = (), *, interlaced: bool = False
) -> bytes:
    """Returns a PNG.

    Args:
        values: (h, w) or (h, w, channels).
        bits: Of a channel.
        colour: Type: 0 grey, 2 RGB.
        key: The transparent colour.
        interlaced: Whether in seven passes.
    """
    height, width = values.shape[:2]
    parts = [values[y::dy, x::dx] for y, x, dy, dx in PASSES] if interlaced else [values]
    data = b""
    for row in (row for part in parts if part.size for row in part):
        data += b"\0" + (packed(row[None], bits) if bits < 8 else row.astype(f">u{bits // 8}").tobytes())
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    transparent = png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    chunks = png_chunk(b"IHDR", head) + transparent + png_chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def tiff(
    values: np.ndarray,
    bits: int,
    photometric: int | None,
    kind: int = 1,
    *,
    order: str = "<",
    separate: bool = False,
    deflated: bool = False,
    extra: int | None = None,
    colours: np.ndarray | None = None,
    orientation: int = 1,
) -> bytes:
    """Returns a TIFF of one strip, or one a plane.

    Args:
        values: (h, w) or (h, w, channels).
        bits: Of a channel.
        photometric: PhotometricInterpretation: 0 and 1 grey, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 Lab; None
            leaves it out.
        kind: SampleFormat: 1 unsigned, 2 signed, 3 floating point.
        order: `<` or `>`.
        separate: Whether channels lie one after another.
        deflated: Whether compressed.
        extra: What the last channel is: 1 and 2 alpha, 1 with colours multiplied by it.
        colours: ColorMap (3, 2^bits).
        orientation: Of EXIF.
    """
    values = np.atleast_3d(values)
    height, width, channels = values.shape
    letter = {1: "u", 2: "i", 3: "f"}[kind]
    planes = [values[..., [channel]] for channel in range(channels)] if separate else [values]
    strips = [
        plane.astype(f"{order}{letter}{bits // 8}").tobytes()
        if bits % 8 == 0
        else packed(plane[..., 0], bits)
        for plane in planes
    ]
    strips = [zlib.compress(strip) if deflated else strip for strip in strips]
    starts = [8 + sum(map(len, strips[:strip])) for strip in range(len(strips))]
    tags = {256: [width], 257: [height], 258: [bits] * channels, 259: [8 if deflated else 1]}
    tags |= {} if photometric is None else {262: [photometric]}
    tags |= {274: [orientation], 277: [channels], 278: [height], 284: [1 + separate], 339: [kind] * channels}
    tags |= {} if extra is None else {338: [extra]}
    tags |= {} if colours is None else {320: colours.flatten().tolist()}
    tags |= {530: [1, 1]} if photometric == 6 else {}
    tags |= {273: starts, 279: [len(strip) for strip in strips]}
    directory = 8 + sum(map(len, strips))
    entries, behind = b"", b""
    for tag, numbers in sorted(tags.items()):
        letter, code = ("I", 4) if tag in (273, 279) else ("H", 3)
        field = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(field) > 4:
            at = directory + 2 + 12 * len(tags) + 4 + len(behind)
            behind, field = behind + field, struct.pack(f"{order}I", at)
        entries += struct.pack(f"{order}HHI", tag, code, len(numbers)) + field.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory)
    count = struct.pack(f"{order}H", len(tags))
    return head + b"".join(strips) + count + entries + bytes(4) + behind


def gif(
    screen: tuple[int, int], corner: tuple[int, int], frame: np.ndarray, palette: list, key: int | None = None
) -> bytes:
    """Returns a GIF whose one frame lies somewhere on its screen.

    Args:
        screen: Width and height.
        corner: Of the frame: left and top.
        frame: Indices (h, w) below 4.
        palette: Four colours.
        key: The transparent index.
    """
    height, width = frame.shape
    codes = [code for index in frame.flatten().tolist() for code in (4, index)] + [5]  # 4 clears the table
    bits = sum(code << 3 * place for place, code in enumerate(codes))
    data = bits.to_bytes(-(-3 * len(codes) // 8), "little")
    control = b"" if key is None else b"\x21\xf9\x04\x01\0\0" + bytes([key, 0])
    blocks = b"".join(
        bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)
    )
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x81, 0, 0) + bytes(np.ravel(palette).tolist())
    image = b"," + struct.pack("<HHHHB", *corner, width, height, 0) + b"\2" + blocks + b"\0;"
    return head + control + image


def bmp(values: np.ndarray, masks: tuple[int, ...], bits: int) -> bytes:
    """Returns a BMP of fields of bits.

    Args:
        values: (h, w), each below 2^bits.
        masks: Of red, green, blue and, where there are four, alpha.
        bits: 16 or 32.
    """
    height, width = values.shape
    rows = [row.astype(f"<u{bits // 8}").tobytes() for row in values[::-1]]
    data = b"".join(row + bytes(-len(row) % 4) for row in rows)
    fields = struct.pack(f"<{len(masks)}I", *masks)
    head = struct.pack("<IiiHHIIiiII", 40 + 4 * len(masks), width, height, 1, bits, 3, len(data), 0, 0, 0, 0)
    start = 14 + len(head) + len(fields)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + fields + data
