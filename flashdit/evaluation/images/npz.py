"""Images of an npz, as ADM's sampler writes it, read piece by piece."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashdit.evaluation.images.reading import Batches, label_mode, limited, prefetched
from flashdit.shared.files import file_sha256

RECIPE_FILE = "recipe.json"  # what `flashdit sample` writes beside its samples.npz


class NpzSource:
    """Images `arr_0` (n, h, w, 3) uint8 of an npz, read piece by piece; labels `arr_1` (n,) where they exist.

    Args:
        path: The npz, as ADM's sampler or `numpy.savez` writes it.
        limit: Read only so many images from the start; None means all.

    Raises:
        ValueError: If the file is no npz or its arrays have another type or shape.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self.path, self.name = path, path.name
        try:
            check_headers(path)
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                self.shape, fortran_order, dtype = read_npy_header(member)
                about = archive.getinfo("arr_0.npy")
                self._content = {"crc": about.CRC, "size": about.file_size}
            labels = self._read_labels()
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            raise ValueError(f"samples must be an npz with images in arr_0, got {path}: {error}") from error
        if (
            dtype != np.uint8
            or len(self.shape) != 4
            or self.shape[-1] != 3
            or fortran_order
            or 0 in self.shape
        ):
            raise ValueError(
                f"arr_0 must be uint8 (n, h, w, 3) in C order with n ≥ 1, got {dtype} {self.shape} in {path}"
            )
        self.count = limited(self.shape[0], limit, path)
        self.image_size = (self.shape[1], self.shape[2])
        self.labels = None if labels is None else labels[: self.count]

    def _read_labels(self) -> Tensor | None:
        """Returns the labels of `arr_1`, or None without them."""
        with np.load(self.path, allow_pickle=False) as arrays:
            if "arr_1" not in arrays.files:
                return None
            labels = np.asarray(arrays["arr_1"])
        if labels.shape != self.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"arr_1 must be one integer label per image, got {labels.dtype} {labels.shape} in {self.path}"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Batches:
        """Yields the images of ascending ids, None for all, at most batch_size at a time."""
        yield from prefetched(self._read(batch_size, torch.arange(self.count) if ids is None else ids))

    def _read(self, batch_size: int, ids: Tensor) -> Batches:
        """Yields the images of ascending ids, having passed over all before the last."""
        _, *image_shape = self.shape
        image_bytes = int(np.prod(image_shape))
        end = int(ids[-1]) + 1 if len(ids) else 0
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            read_npy_header(member)
            for start in range(0, end, batch_size):
                rows = min(batch_size, end - start)
                try:
                    data = member.read(rows * image_bytes)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ValueError(f"{self.path} is damaged: {error}") from error
                if len(data) != rows * image_bytes:
                    raise ValueError(f"{self.path} ends early: arr_0 lacks images from number {start} on")
                wanted = ids[(ids >= start) & (ids < start + rows)] - start
                if len(wanted):
                    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, *image_shape)
                    yield rearrange(images[wanted], "b h w c -> b c h w").contiguous()

    @property
    def sha256(self) -> str:
        """The hash of the file."""
        return file_sha256(self.path)

    def identity(self) -> dict[str, Any]:
        """Returns what the images are known by: the checksum that the archive keeps of them."""
        return {"kind": "npz", **self._content, "count": self.count}

    def recipe(self) -> dict[str, Any]:
        """Returns path, count and checksum, and the recipe that `flashdit sample` left beside the file."""
        recipe = {
            "source": "npz",
            "path": str(self.path),
            "num_images": self.count,
            "labels": label_mode(self.labels),
            "crc32": self._content["crc"],
        }
        beside = self.path.with_name(RECIPE_FILE)
        return recipe | ({"recipe": json.loads(beside.read_text())} if beside.is_file() else {})


def check_headers(path: Path) -> None:
    """Raises ValueError for an npz with an array whose header claims another size than its bytes have.

    numpy would allocate what the header claims before it reads.
    """
    with zipfile.ZipFile(path) as archive:
        for about in archive.infolist():
            if not about.filename.endswith(".npy"):
                continue
            with archive.open(about) as member:
                shape, _, dtype = read_npy_header(member)
                claimed = math.prod(shape) * dtype.itemsize
                if claimed != about.file_size - member.tell() and not dtype.hasobject:
                    raise ValueError(
                        f"an array of an npz must have the {claimed:,} bytes of its header, {about.filename} "
                        f"has {about.file_size - member.tell():,} in {path}"
                    )


def read_npy_header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads a npy header, leaving the file at its data: (shape, whether in Fortran order, dtype)."""
    try:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        return read(member)
    except ValueError as error:
        raise KeyError(f"arr_0 is no array ({error})") from error
