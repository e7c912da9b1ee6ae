"""Which images does an npz hold, as ADM's sampler writes it? Headers are checked, images read in pieces."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flashdit.evaluation.images.reading import Batches, label_mode, limited, prefetched
from flashdit.evaluation.images.recorded import names_in_recipe, sample_recipe
from flashdit.sampling.damage import BROKEN
from flashdit.sampling.folder import ARRAYS
from flashdit.shared.files import file_sha256

SAMPLES_RULE = "samples must be an npz with images in arr_0"
READ_AT_MOST = 2**28  # bytes of images at a time
LOADED_AT_MOST = 2**32
"""Bytes of an array that is read whole; a few bytes in a file may claim, and unpack to, any number."""


class NpzSource:
    """Images `arr_0` (n, h, w, 3) uint8 of an npz, read piece by piece; labels `arr_1` (n,) where they exist.

    Args:
        path: The npz, as ADM's sampler or `numpy.savez` writes it.
        limit: Read only so many images from the start; None means all.

    Attributes:
        class_names: What labels are called, where the file of make-reference, or the recipe that
            `flashdit sample` left beside its file, says so.

    Raises:
        ValueError: If the file is no npz or its arrays have another type or shape.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self.path, self.name = path, path.name
        self._recipe = sample_recipe(path.parent) if path.name == ARRAYS else {}
        self.class_names = names_in_recipe(self._recipe)
        with open_archive(path, SAMPLES_RULE) as archive:
            headers = read_headers(archive, path)
            if "arr_0" not in headers:
                raise ValueError(f"{SAMPLES_RULE}, got {sorted(headers)} in {path}")
            check_images(headers["arr_0"], path)
            self.shape = headers["arr_0"].shape
            labels = self._read_labels(archive, headers["arr_1"]) if "arr_1" in headers else None
            if "class_names" in headers:
                self.class_names = self._read_names(archive, headers["class_names"])
        if self._recipe.get("num_images", self.shape[0]) != self.shape[0]:
            expected = self._recipe["num_images"]
            raise ValueError(
                f"{path} must have the {expected} samples of its recipe.json, got {self.shape[0]}"
            )
        self.count = limited(self.shape[0], limit, path)
        self.image_size = (self.shape[1], self.shape[2])
        self.labels = None if labels is None else labels[: self.count]

    def _read_labels(self, archive: zipfile.ZipFile, header: Header) -> Tensor:
        """Returns the labels of `arr_1`."""
        if header.shape != self.shape[:1] or header.dtype.kind not in "iu":
            raise ValueError(
                f"arr_1 must be one integer label per image, got {header.dtype} {header.shape} in {self.path}"
            )
        return torch.from_numpy(read_array(archive, "arr_1", header, self.path).astype(np.int64))

    def _read_names(self, archive: zipfile.ZipFile, header: Header) -> dict[int, str]:
        """Returns the names of labels, by label."""
        if len(header.shape) != 1 or header.dtype.kind != "U":
            raise ValueError(
                f"class_names must be one name for each label, got {header.dtype} {header.shape} in "
                f"{self.path}"
            )
        return dict(enumerate(read_array(archive, "class_names", header, self.path).tolist()))

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Batches:
        """Yields the images of ascending ids, None for all, at most batch_size at a time."""
        yield from prefetched(self._read(batch_size, torch.arange(self.count) if ids is None else ids))

    def _read(self, batch_size: int, ids: Tensor) -> Batches:
        """Yields the images of ascending ids, having passed over all before the last."""
        _, *image_shape = self.shape
        image_bytes = int(np.prod(image_shape))
        at_once = max(1, min(batch_size, READ_AT_MOST // image_bytes))
        end = int(ids[-1]) + 1 if len(ids) else 0
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            read_npy_header(member, "arr_0.npy")
            for start in range(0, end, at_once):
                rows = min(at_once, end - start)
                try:
                    data = member.read(rows * image_bytes)
                except BROKEN as error:
                    raise ValueError(f"{self.path} is damaged: {error}") from error
                if len(data) != rows * image_bytes:
                    raise ValueError(f"{self.path} ends early: arr_0 lacks images from number {start} on")
                wanted = ids[(ids >= start) & (ids < start + rows)] - start
                if len(wanted):
                    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, *image_shape)
                    yield rearrange(images[wanted], "b h w c -> b c h w").contiguous()

    @property
    def sha256(self) -> str:
        """The hash of the file, which is read to its end for it."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return file_sha256(self.path)

    def identity(self) -> dict[str, Any]:
        """Returns what the images are known by: the hash of the file."""
        return {"kind": "npz", "sha256": self.sha256, "count": self.count}

    def recipe(self) -> dict[str, Any]:
        """Returns path, count and hash, and the recipe that `flashdit sample` left beside the file."""
        recipe = {
            "source": "npz",
            "path": str(self.path),
            "num_images": self.count,
            "labels": label_mode(self.labels),
            "sha256": self.sha256,
        }
        return recipe | ({"recipe": self._recipe} if self._recipe else {})


class Header(NamedTuple):
    """What an array of an npz says of itself."""

    shape: tuple[int, ...]
    in_fortran_order: bool
    dtype: np.dtype


@contextmanager
def open_archive(path: Path, rule: str) -> Iterator[zipfile.ZipFile]:
    """Opens an npz; whatever is wrong with the archive is one sentence with the rule and the file.

    Raises:
        ValueError: If it is no zip archive, damaged, encrypted or packed by an unknown method.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except BROKEN as error:
        raise ValueError(f"{rule}, got {path}: {error}") from error


def read_headers(archive: zipfile.ZipFile, path: Path) -> dict[str, Header]:
    """Returns the header of every array by name, having checked it against the bytes that there are.

    numpy would allocate what a header claims before it reads.

    Raises:
        ValueError: If a name comes twice, or an array has Python objects or another size than its bytes.
    """
    headers: dict[str, Header] = {}
    for about in archive.infolist():
        name = about.filename.removesuffix(".npy")
        if name == about.filename:
            continue
        if name in headers:
            raise ValueError(f"an npz must have each array once, got {about.filename} twice in {path}")
        with archive.open(about) as member:
            header = read_npy_header(member, about.filename)
            claimed, there = math.prod(header.shape) * header.dtype.itemsize, about.file_size - member.tell()
        if header.dtype.hasobject:
            raise ValueError(
                f"an array of an npz must not hold Python objects, {about.filename} does in {path}"
            )
        if claimed != there:
            raise ValueError(
                f"an array of an npz must have the {claimed:,} bytes of its header, {about.filename} "
                f"has {there:,} in {path}"
            )
        headers[name] = header
    return headers


def read_array(archive: zipfile.ZipFile, name: str, header: Header, path: Path) -> np.ndarray:
    """Returns an array whose header is checked, read whole.

    Raises:
        ValueError: If it is larger than `LOADED_AT_MOST`.
    """
    claimed = math.prod(header.shape) * header.dtype.itemsize
    if claimed > LOADED_AT_MOST:
        raise ValueError(
            f"{name} of an npz must have at most {LOADED_AT_MOST:,} bytes, got {claimed:,} in {path}"
        )
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def check_images(header: Header, path: Path) -> None:
    """Raises ValueError unless an array's header is that of images."""
    shape, limit = header.shape, Image.MAX_IMAGE_PIXELS
    is_images = header.dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and min(shape) > 0
    if not is_images or header.in_fortran_order:
        raise ValueError(
            f"arr_0 must be uint8 (n, h, w, 3) in C order with n ≥ 1, got {header.dtype} {shape} in {path}"
        )
    if limit is not None and shape[1] * shape[2] > limit:
        raise ValueError(
            f"an image must have at most {limit:,} pixels, got {shape[2]} × {shape[1]} in {path}"
        )


def read_npy_header(member: Any, name: str) -> Header:
    """Reads a npy header, leaving the file at its data.

    Raises:
        EOFError: If there is none.
    """
    try:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return Header(*read(member))
    except Exception as error:  # numpy parses it as Python, which fails in many ways
        raise EOFError(f"{name} is no array ({error})") from error
