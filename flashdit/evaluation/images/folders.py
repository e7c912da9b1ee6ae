"""Images of a folder, in one order and of one size, with labels where sub-folders are classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flashdit.data.sources import IMAGE_SUFFIXES
from flashdit.evaluation.images.reading import Batches, label_mode, limited, prefetched

READERS = min(8, os.cpu_count() or 1)  # threads that decode; Pillow lets them run side by side


class FolderSource:
    """Every image below a folder, by integer stem and then by name; class sub-folders give labels.

    Args:
        path: The folder.
        limit: Read only so many images in that order; None means all.
        class_names: The data's classes. Sub-folders called by them, or by their numbers, get those numbers as
            labels; other sub-folders are numbered in their order.

    Raises:
        ValueError: If there is no image, or the first cannot be read.
    """

    def __init__(self, path: Path, limit: int | None = None, class_names: Sequence[str] = ()):
        self.path, self.name = path, path.name
        files = sorted(
            (file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()),
            key=lambda file: (file_order(file), str(file)),
        )
        if not files:
            raise ValueError(
                f"a folder of images must hold at least one {'/'.join(sorted(IMAGE_SUFFIXES))}, got {path}"
            )
        self.count = limited(len(files), limit, path)
        self.files = files[: self.count]
        labels = folder_labels([file.relative_to(path) for file in files], class_names)
        self.labels = None if labels is None else labels[: self.count]
        _, height, width = read_image(self.files[0]).shape
        self.image_size = (height, width)

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Batches:
        """Yields the images of ascending ids, None for all; a file that is no such image is named."""
        files = self.files if ids is None else [self.files[row] for row in ids.tolist()]
        yield from prefetched(self._read(files, batch_size))

    def _read(self, files: Sequence[Path], batch_size: int) -> Batches:
        """Yields the images of files, at most batch_size at a time."""
        height, width = self.image_size
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(files), batch_size):
                batch = files[start : start + batch_size]
                images = list(readers.map(read_image, batch))
                for file, image in zip(batch, images, strict=True):
                    _, h, w = image.shape
                    if (h, w) != (height, width):
                        raise ValueError(
                            f"images of a folder must have one size, got {width}×{height} and {w}×{h} "
                            f"({self.files[0]} and {file})"
                        )
                yield torch.stack(images)

    def identity(self) -> dict[str, Any]:
        """Returns what the images are known by: names, sizes and times of the files."""
        digest = hashlib.sha256()
        for file in self.files:
            about = file.stat()
            digest.update(f"{file.relative_to(self.path)}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return {"kind": "folder", "files": digest.hexdigest(), "count": self.count}

    def recipe(self) -> dict[str, Any]:
        """Returns path and count."""
        return {
            "source": "folder",
            "path": str(self.path),
            "num_images": self.count,
            "labels": label_mode(self.labels),
            "names_sha256": self.sha256,
        }

    @property
    def sha256(self) -> str:
        """The hash of the names and sizes of the files, which a copy of the folder shares."""
        lines = (f"{file.relative_to(self.path)}\0{file.stat().st_size}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


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
        ids = {folder: label for label, folder in enumerate(folders)}
    return torch.tensor([ids[file.parts[0]] for file in files])
