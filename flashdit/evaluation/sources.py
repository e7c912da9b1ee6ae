"""Where images come from: an npz, a folder, the digits or a generator, all as uint8 NCHW batches."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flashdit.data.digits import digits
from flashdit.data.sources import IMAGE_SUFFIXES

SAMPLES_FILE = "samples.npz"
Batch = tuple[Tensor, Tensor | None]  # images uint8 (b, 3, h, w), labels int64 (b,) or None


class Source(Protocol):
    """A named, counted set of images that can be read again from its start."""

    name: str
    count: int

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields every image once, in a fixed order."""
        ...

    def recipe(self) -> dict[str, Any]:
        """Returns what a report says of where the images came from."""
        ...


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
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                self.shape, fortran_order, dtype = read_npy_header(member)
            self.labels = self._read_labels()
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

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields the images in the file's order."""
        _, *image_shape = self.shape
        image_bytes = int(np.prod(image_shape))
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            read_npy_header(member)
            for start in range(0, self.count, batch_size):
                rows = min(batch_size, self.count - start)
                try:
                    data = member.read(rows * image_bytes)
                except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                    raise ValueError(f"{self.path} is damaged: {error}") from error
                if len(data) != rows * image_bytes:
                    raise ValueError(f"{self.path} ends early: arr_0 lacks images from number {start} on")
                images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, *image_shape)
                labels = None if self.labels is None else self.labels[start : start + rows]
                yield rearrange(images, "b h w c -> b c h w").contiguous(), labels

    def recipe(self) -> dict[str, Any]:
        """Returns path and count."""
        return {"source": "npz", "path": str(self.path), "num_images": self.count}


class FolderSource:
    """Every image below a folder, by integer stem and then by name; class sub-folders give labels.

    Args:
        path: The folder.
        limit: Read only so many images in that order; None means all.
        class_names: The data's classes. Sub-folders called by them, or by their numbers, get those numbers as
            labels; other sub-folders are numbered in their order.

    Raises:
        ValueError: If there is no image.
    """

    def __init__(self, path: Path, limit: int | None = None, class_names: Sequence[str] = ()):
        self.path, self.name = path, path.name
        self.files = sorted(
            (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()),
            key=lambda file: (file_order(file), str(file)),
        )
        if not self.files:
            raise ValueError(
                f"a folder of images must hold at least one {'/'.join(sorted(IMAGE_SUFFIXES))}, got {path}"
            )
        self.labels = folder_labels([file.relative_to(path) for file in self.files], class_names)
        self.count = limited(len(self.files), limit, path)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields the images in order; a file that cannot be read or has another size is named."""
        first = read_image(self.files[0])
        for start in range(0, self.count, batch_size):
            files = self.files[start : min(start + batch_size, self.count)]
            images = [read_image(file) for file in files]
            for file, image in zip(files, images, strict=True):
                if image.shape != first.shape:
                    sizes = " and ".join(f"{w}×{h}" for _, h, w in (first.shape, image.shape))
                    raise ValueError(
                        f"images of a folder must have one size, got {sizes} ({self.files[0]} and {file})"
                    )
            labels = None if self.labels is None else self.labels[start : start + len(files)]
            yield torch.stack(images), labels

    def recipe(self) -> dict[str, Any]:
        """Returns path and count."""
        return {"source": "folder", "path": str(self.path), "num_images": self.count}


class DigitsSource:
    """One split of the embedded digits, `train` or `held-out`."""

    def __init__(self, split: str):
        self.images, self.labels = digits(split)
        self.name, self.count = f"digits {split}", len(self.images)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields the split in its order."""
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)

    def recipe(self) -> dict[str, Any]:
        """Returns name and count."""
        return {"source": self.name, "num_images": self.count}


class GeneratedSource:
    """Images that a generator draws while they are read; nothing touches the disk.

    Args:
        generator: What `flashdit.generate.load_generator` returns.
        labels: (n,) int64 class of every image.
        options: The sampling options; they, and not the reader, set the batch size.
    """

    def __init__(self, generator: Any, labels: Tensor, options: Any):
        self.generator, self.labels, self.options = generator, labels, options
        self.name, self.count = "samples", len(labels)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yields images in the order of the labels."""
        for batch in self.generator.generate(self.labels, self.options):
            yield batch.images, batch.labels

    def recipe(self) -> dict[str, Any]:
        """Returns the checkpoint, the sampling options and the cost of a sample."""
        nfe = self.generator.nfe(self.options)
        return {
            "source": "checkpoint",
            **self.generator.recipe(),
            "sampling": vars(self.options),
            "nfe": nfe,
            "summary": f"{self.options}, {nfe} model evaluations each",
            "labels": "balanced, in seeded random order",
            "num_images": self.count,
        }


def open_source(path: Path, limit: int | None = None, class_names: Sequence[str] = ()) -> Source:
    """Returns the source that a path names: a file is an npz, a directory a folder of images.

    A folder that sample.py wrote is read from its samples.npz, which has the labels and not the grid picture.

    Raises:
        ValueError: If it is neither, or what it holds is no image set.
    """
    if (path / SAMPLES_FILE).is_file():
        return NpzSource(path / SAMPLES_FILE, limit)
    if path.is_dir():
        return FolderSource(path, limit, class_names)
    if not path.is_file():
        raise ValueError(f"images must be an existing npz or folder, got {path}")
    return NpzSource(path, limit)


def limited(count: int, limit: int | None, path: Path) -> int:
    """Returns how many images to read; more than there are is refused."""
    if limit is not None and not 1 <= limit <= count:
        raise ValueError(f"the number of images must be 1 to the {count} in {path}, got {limit}")
    return count if limit is None else limit


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


def read_image(file: Path) -> Tensor:
    """Returns an image file as RGB uint8 (3, h, w).

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports a broken PNG by any of the three
        raise ValueError(f"every image of a folder must be readable, got {file}: {error}") from error
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w").contiguous()


def file_order(file: Path) -> tuple[int, int]:
    """Returns a sort key: integer stems by their number, before all others."""
    return (0, int(file.stem)) if file.stem.isdecimal() else (1, 0)


def folder_labels(files: Sequence[Path], class_names: Sequence[str]) -> Tensor | None:
    """Returns the label of each relative path by its first folder, or None where some lie in no folder."""
    if any(len(file.parts) == 1 for file in files):
        return None
    folders = sorted({file.parts[0] for file in files})
    if all(folder in class_names for folder in folders):
        ids = {folder: list(class_names).index(folder) for folder in folders}
    elif all(folder.isdecimal() for folder in folders):
        ids = {folder: int(folder) for folder in folders}
    else:
        ids = {folder: place for place, folder in enumerate(folders)}
    return torch.tensor([ids[file.parts[0]] for file in files])
