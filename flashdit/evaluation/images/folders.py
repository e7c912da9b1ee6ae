"""Images of a folder, in one order and of one size, with labels where sub-folders are classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashdit.data.images import (
    READERS,
    WHITE,
    find_images,
    parse_background,
    read_image,
    report_images,
)
from flashdit.data.walk import printable
from flashdit.evaluation.images.reading import Batches, label_mode, limited, prefetched


class FolderSource:
    """Every image of a folder, by integer stem and then by name; class sub-folders give labels.

    Args:
        path: The folder.
        limit: Read only so many images in that order; None means all.
        class_names: The data's classes. Sub-folders called by them, or by their numbers, get those numbers as
            labels; other sub-folders are numbered in their natural order.
        background: What transparent pixels show: a colour's name or `#rrggbb`.

    Raises:
        ValueError: If there is no image, a file is no image though its name says so, or the first cannot be
            read.
    """

    def __init__(
        self,
        path: Path,
        limit: int | None = None,
        class_names: Sequence[str] = (),
        background: str = "white",
    ):
        self.path, self.name = path, path.name
        self.background = parse_background(background)
        found = find_images(path, called="a folder of images")
        for name, why in found.unreadable.items():
            raise ValueError(f"every image must be readable, {printable(path / name)} is not: {why}")
        report_images(found.describe(), {})
        sizes = dict(zip(found.paths, found.num_bytes, strict=True))
        files = sorted(sizes, key=lambda file: (file_order(file), str(file)))
        self.count = limited(len(files), limit, path)
        self.files = files[: self.count]
        self.num_bytes = [sizes[file] for file in self.files]
        labels = folder_labels([file.relative_to(path) for file in files], found.class_names, class_names)
        self.labels = None if labels is None else labels[: self.count]
        _, height, width = self._image(self.files[0]).shape
        self.image_size = (height, width)

    def _image(self, file: Path) -> Tensor:
        """Returns a file as RGB uint8 (3, h, w)."""
        pixels = torch.from_numpy(np.array(read_image(file, self.background)))
        return rearrange(pixels, "h w c -> c h w").contiguous()

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
                images = list(readers.map(self._image, batch))
                for file, image in zip(batch, images, strict=True):
                    _, h, w = image.shape
                    if (h, w) != (height, width):
                        raise ValueError(
                            f"images of a folder must have one size, got {width}×{height} and {w}×{h} "
                            f"({self.files[0]} and {file})"
                        )
                yield torch.stack(images)

    def _digest(self, *, times: bool) -> str:
        """Returns the hash of the background unless it is white, and of names, sizes and perhaps times."""
        digest = hashlib.sha256(b"" if self.background == WHITE else str(self.background).encode())
        for file, size in zip(self.files, self.num_bytes, strict=True):
            time = f"\0{file.stat().st_mtime_ns}" if times else ""
            digest.update(f"{file.relative_to(self.path)}\0{size}{time}\n".encode())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Returns what the images are known by: names, sizes and times of the files, and the background."""
        return {
            "kind": "folder",
            "files": self._digest(times=True),
            "count": self.count,
            "background": self.background,
        }

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
        return self._digest(times=False)


def file_order(file: Path) -> tuple[int, int]:
    """Returns a sort key: integer stems by their number, before all others."""
    return (0, int(file.stem)) if file.stem.isdecimal() else (1, 0)


def folder_labels(files: Sequence[Path], folders: Sequence[str], class_names: Sequence[str]) -> Tensor | None:
    """Returns the label of each relative path by its first folder, or None where they lie in none.

    Args:
        files: Relative paths.
        folders: The class folders, in natural order.
        class_names: The data's classes.
    """
    if len(files[0].parts) == 1:
        return None
    if all(folder in class_names for folder in folders):
        ids = {folder: list(class_names).index(folder) for folder in folders}
    elif all(folder.isdecimal() for folder in folders):
        ids = {folder: int(folder) for folder in folders}
    else:
        ids = {folder: label for label, folder in enumerate(folders)}
    return torch.tensor([ids[file.parts[0]] for file in files])
