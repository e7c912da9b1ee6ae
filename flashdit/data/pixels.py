"""Pixels without an autoencoder: images read when they are asked for, and the space they are trained in."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdit.data.sources import PixelSource


class Pixels:
    """What stands for the autoencoder where there is none: uint8 pixels ⇄ −1 to 1, and nothing else.

    Source: JiT (Li & He 2025, arXiv 2511.13720) trains on pixels from −1 to 1 without statistics of the data.
    """

    name = "pixels"
    channels, factor, image_side, has_posterior = 3, 1, None, False
    module = identity = None

    def to(self, device: torch.device | str) -> Pixels:
        """Returns itself: there is nothing to move."""
        return self

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns pixels from −1 to 1: uint8 (B, 3, H, W) → float32 (B, 3, H, W)."""
        assert noise is None
        return images.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the same pixels, float32 (B, 3, H, W)."""
        return latents.float()


class PixelImages:
    """Pixels and labels of a source, each image read when it is asked for: memory does not grow with them.

    Args:
        source: The images, all of one size.

    Attributes:
        labels: (N,) int64.
        class_names: One per class.
        mirrors: Whether an image is mirrored half the time: only where the source says so.
        shape: (3, H, W).
    """

    def __init__(self, source: PixelSource):
        self.source, self.labels = source, source.labels
        self.class_names: list[str] | None = source.class_names
        self.num_classes, self.mirrors = len(source.class_names), bool(source.mirrors)
        self.shape = tuple(source.image(0).shape)
        self.identity = getattr(source, "identity", None)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Returns pixels, uint8 (B, 3, H, W), of rows (B,); `mirrored` (B,) tells which mirrors.

        Raises:
            ValueError: If an image is no longer readable, or has another size than the first one.
            FileNotFoundError: If the folder of the images is gone.
        """
        images = torch.empty(len(indices), *self.shape, dtype=torch.uint8)
        for place, (row, flip) in enumerate(zip(indices.tolist(), mirrored.tolist(), strict=True)):
            image = self.source.image(row)
            if tuple(image.shape) != self.shape:
                shapes = f"image {row} is {tuple(image.shape)}, the first one {self.shape}"
                raise ValueError(f"all images must have one size, {shapes}")
            images[place] = image.flip(-1) if flip else image
        return images
