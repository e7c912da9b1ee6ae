"""Data sets by name, and what a data set brings beside its images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flashdit.data.shards import LatentShards
from flashdit.shared.registry import Buildable, Registry

DATASETS = Registry("data", "flashdit.data")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class PixelSource(Protocol):
    """Images and labels; the trainer encodes them by the autoencoder, or trains on them as they are."""

    labels: Tensor
    class_names: list[str]
    mirrors: bool | None
    """Whether images are mirrored half the time; None: where they are encoded, but not as pixels."""

    def image(self, index: int) -> Tensor:
        """Returns one image, uint8 (3, H, W)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What a data set brings: the attribute `companions` of its class, used by the data set's name."""

    autoencoder: Path | None = None
    """Folder or file of its autoencoder, which `latents.vae` gives by the data set's name."""
    reference: Callable[[], Any] | None = None
    """Returns real images held out, a `flashdit.evaluation.images.sources.Source`."""
    floor: Callable[[], Any] | None = None
    """Returns training images, likewise a Source: their scores are the floor of what samples can reach."""
    extractor: str | None = None
    """The extractor for scores against its reference; None means Inception."""
    num_images: int = 50_000
    """Samples that are scored against its reference unless another number is given."""


def companions_of(name: str | None) -> Companions:
    """Returns what the data set of a name brings; nothing where there is no such data set."""
    if name is None or name not in DATASETS.names():
        return Companions()
    return getattr(cast(Buildable, DATASETS[name]).build, "companions", Companions())


class MemoryLatents:
    """Latents held in memory, as (N, C, H, W) and, where mirrored ones exist, as much again.

    Args:
        latents: VAE latents (N, C, H, W).
        mirrored: Latents of the mirrored images, or None.
        labels: (N,) int64.
        class_names: One per class.
    """

    def __init__(self, latents: Tensor, mirrored: Tensor | None, labels: Tensor, class_names: list[str]):
        self.latents, self.mirrored, self.labels = latents, mirrored, labels
        self.identity: Callable[[], dict[str, Any]] | None = None  # of what was encoded
        self.class_names: list[str] | None = class_names
        self.num_classes = len(class_names)
        self.mirrors = mirrored is not None
        self.shape = tuple(latents.shape[1:])

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Returns VAE latents (B, C, H, W) of rows (B,); `mirrored` (B,) tells which mirrors."""
        latents = self.latents[indices]
        if self.mirrored is not None:
            latents[mirrored] = self.mirrored[indices[mirrored]]
        return latents


@dataclass(kw_only=True)
class ShardsOptions:
    """Options of latent shards."""

    path: str
    """Folder of `latents_rankRR_shardSSS.safetensors`."""
    mirrors: bool = True
    """Whether a mirrored latent is taken half the time."""


@DATASETS.register("shards", ShardsOptions)
class Shards(LatentShards):
    """Latent shards in LightningDiT's layout."""

    def __init__(self, options: ShardsOptions):
        super().__init__(Path(options.path))
        self.mirrors = options.mirrors


@dataclass(kw_only=True)
class ImagesOptions:
    """Options of an image folder."""

    path: str
    """Folder whose sub-folders are the classes; a folder without sub-folders is one class."""
    image_size: int = 256
    """Images are cropped to a square of this side, in pixels."""
    mirrors: bool | None = None
    """Whether images are mirrored half the time; null: where they are encoded, but not as pixels."""

    def __post_init__(self):
        if self.image_size < 1:
            raise ValueError(f"data.image_size must be at least 1, got {self.image_size}")


@DATASETS.register("images", ImagesOptions)
class ImageFolder:
    """Images in class sub-folders.

    Args:
        options: Folder, side and mirroring.

    Raises:
        ValueError: If the folder holds no image.
    """

    def __init__(self, options: ImagesOptions):
        root = Path(options.path)
        if not root.is_dir():
            raise ValueError(f"data.path must be a folder of images, got {root}")
        folders = sorted(child for child in root.iterdir() if child.is_dir()) or [root]
        files = {folder.name: _images_in(folder) for folder in folders}
        files = {name: paths for name, paths in files.items() if paths}
        if not files:
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"data.path must hold images ({suffixes}), got none in {root}")
        self.root, self.image_size = root, options.image_size
        self.mirrors = options.mirrors
        self.class_names = list(files)
        self.paths = [path for paths in files.values() for path in paths]
        self.labels = torch.tensor([i for i, paths in enumerate(files.values()) for _ in paths])

    def identity(self) -> dict[str, Any]:
        """Returns what the images are known by: their classes, names below the folder and sizes."""
        sizes = {path.relative_to(self.root).as_posix(): path.stat().st_size for path in self.paths}
        return {"classes": self.class_names, "files": sizes}

    def image(self, index: int) -> Tensor:
        """Returns one centre-cropped image, uint8 (3, S, S)."""
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                image = centre_crop(file.convert("RGB"), self.image_size)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"every image must be readable, {path} is not: {error}") from error
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _images_in(folder: Path) -> list[Path]:
    """Returns the image files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Returns the central square of an image at the given side.

    Halves with a box filter while the short side is at least twice the target, then bicubic, then crops.

    Source: ADM's `center_crop_arr` (Dhariwal & Nichol 2021), which ImageNet figures are made with.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
