"""Is a file of samples as it was written? The checksums within it say so; no pixel is decoded."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = (  # RuntimeError: an encrypted member, or an unknown method of packing
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, RuntimeError),
)
"""What readers raise of a damaged archive."""
UNREADABLE = (*BROKEN, ValueError, SyntaxError)
"""What they raise of any damaged file."""


def is_whole_png(path: Path) -> bool:
    """Returns whether a PNG has all its chunks to the last, each with its checksum."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except UNREADABLE:
        return False
    return True


def is_whole_npz(path: Path, names: Collection[str]) -> bool:
    """Returns whether an npz has arrays of these names, each with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in names} <= {*archive.namelist()} and archive.testzip() is None
    except UNREADABLE:
        return False


def is_whole_samples(path: Path, labels: np.ndarray) -> bool:
    """Returns whether a samples.npz is whole, and of samples of these labels (N,)."""
    if not is_whole_npz(path, ("arr_0", "arr_1")):
        return False
    try:
        with np.load(path) as arrays:
            return np.array_equal(arrays["arr_1"], labels)
    except UNREADABLE:
        return False
