"""Images of a folder, in one order and of one size, with labels where sub-folders are classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashdit.data.images import (
    READERS,
    WHITE,
    crop_of_file,
    enlarged_images,
    find_images,
    image_sides,
    parse_background,
    read_image,
    report_images,
)
from flashdit.evaluation.images.reading import Batches, label_mode, limited, prefetched
from flashdit.evaluation.images.recorded import (
    check_samples,
    names_in_recipe,
    recorded_labels,
    sample_files,
    sample_recipe,
)
from flashdit.shared.files import file_sha256
from flashdit.shared.paths import printable
from flashdit.shared.progress import progress_bar
from flashdit.shared.registry import counted

FilesAndClasses = tuple[list[Path], Tensor | None, dict[int, str] | None]


class FolderSource:
    """Every image of a folder, by integer stem and then by name; class sub-folders give labels.

    Of a folder that `flashdit sample` wrote as PNGs the images are the samples of its recipe, with their
    labels, and no other picture.

    Args:
        path: The folder.
        limit: Read only so many images in that order; None means all.
        background: What transparent pixels show: a colour's name or `#rrggbb`.
        image_size: Side of the square that every image is cropped to, as encoding does, in pixels; None reads
            images as they are, which must have one size.

    Attributes:
        class_names: What labels are called: the sub-folders, or as the recipe of samples says.
        cropped_to: The side, where an image has another size.

    Raises:
        ValueError: If there is no image, a file is no image though its name says so, the first cannot be
            read, or a sample is missing.
    """

    def __init__(
        self,
        path: Path,
        limit: int | None = None,
        background: str = "white",
        image_size: int | None = None,
    ):
        self.path, self.name = path, path.name
        self.background = parse_background(background)
        self._recipe = sample_recipe(path)
        if self._recipe:
            files, self.labels, self.class_names = self._samples()
        else:
            files, self.labels, self.class_names = self._found()
        self.count = limited(len(files), limit, path)
        self.files = files[: self.count]
        self.labels = None if self.labels is None else self.labels[: self.count]
        self.cropped_to = None if image_size is None else self._needs_crop(image_size)
        _, height, width = self._image(self.files[0]).shape
        self.image_size = (height, width)

    def _samples(self) -> FilesAndClasses:
        """Returns the files of samples, their labels and what these are called."""
        check_samples(self.path, self._recipe)
        files = sample_files(self.path, self._recipe)
        labels = recorded_labels(files, self._recipe)
        unknown = "" if labels is not None else "; the pictures do not tell their classes apart"
        samples = counted(len(files), "sample")
        report_images(f"{printable(self.path)}: {samples} of `flashdit sample`{unknown}", {})
        return files, labels, None if labels is None else names_in_recipe(self._recipe)

    def _found(self) -> FilesAndClasses:
        """Returns the files of all images, their labels and what these are called."""
        found = find_images(self.path, called="a folder of images")
        for name, why in found.unreadable.items():
            raise ValueError(f"every image must be readable, {printable(self.path / name)} is not: {why}")
        report_images(found.describe(), {})
        rows = sorted(range(len(found.paths)), key=lambda row: file_order(found.paths[row]))
        files = [found.paths[row] for row in rows]
        if found.paths[0].parent == self.path:
            return files, None, None
        numbers = folder_numbers(found.class_names)
        labels = torch.tensor([numbers[found.labels[row]] for row in rows])
        return files, labels, dict(zip(numbers, found.class_names, strict=True))

    def _needs_crop(self, side: int) -> int | None:
        """Returns the side if an image has another size, having said how many are enlarged; else None."""
        with ThreadPoolExecutor(READERS) as readers:
            extents = dict(zip(self.files, readers.map(image_sides, self.files), strict=True))
        others = sum(extent != (side, side) for extent in extents.values())
        if not others:
            return None
        short_sides = {file.relative_to(self.path).as_posix(): min(size) for file, size in extents.items()}
        enlarged = enlarged_images(short_sides, side)
        line = f"{printable(self.path)}: {others:,} of {self.count:,} images are cropped to {side}×{side}"
        report_images(f"{line}, as encoding does{f'; {enlarged}' if enlarged else ''}", {})
        return side

    def _image(self, file: Path) -> Tensor:
        """Returns a file as RGB uint8 (3, h, w)."""
        picture = read_image(file, self.background)
        if self.cropped_to is not None:
            picture = crop_of_file(picture, self.cropped_to, file)
        return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w").contiguous()

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
                            f"({self.files[0]} and {file}): --image-size crops them"
                        )
                yield torch.stack(images)

    @property
    def sha256(self) -> str:
        """The hash of the files' names and contents, and of a background or crop; a copy shares it."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        reading = "" if self.background == WHITE else str(self.background)
        reading += "" if self.cropped_to is None else f"\0{self.cropped_to}"
        digest = hashlib.sha256(reading.encode())
        with ThreadPoolExecutor(READERS) as readers:
            found = readers.map(file_sha256, self.files)
            bar = progress_bar(found, desc="checksums", unit="file", total=self.count, leave=False)
            for file, content in zip(self.files, bar, strict=True):
                digest.update(os.fsencode(file.relative_to(self.path)) + f"\0{content}\n".encode())
        return digest.hexdigest()

    def identity(self) -> dict[str, Any]:
        """Returns what the images are known by: names and contents of files, and how they are read."""
        return {"kind": "folder", "sha256": self.sha256, "count": self.count}

    def recipe(self) -> dict[str, Any]:
        """Returns path and count, the crop, and the recipe that `flashdit sample` left with the pictures."""
        recipe = {
            "source": "folder",
            "path": str(self.path),
            "num_images": self.count,
            "labels": label_mode(self.labels, (self._recipe or {}).get("labels")),
            "sha256": self.sha256,
            "cropped_to": self.cropped_to,
        }
        return recipe | ({"recipe": self._recipe} if self._recipe else {})


def file_order(file: Path) -> tuple[int, int]:
    """Returns a sort key: integer stems by their number, before all others."""
    return (0, int(file.stem)) if file.stem.isdecimal() else (1, 0)


def folder_numbers(names: Sequence[str]) -> list[int]:
    """Returns the label of each class folder: the number that it is called by, or else its place."""
    numbers = [int(name) for name in names if name.isdecimal()]
    return numbers if len({*numbers}) == len(names) else list(range(len(names)))
