"""Images of a data set, by index, as images that samples are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashdit.evaluation.images.reading import label_mode

HASHED_AT_ONCE = 100


class DatasetSource:
    """One split of a data set, each image read or drawn when it is asked for.

    Args:
        image: Gives the image of an index, uint8 (3, h, w), always the same one.
        labels: (n,) int64, of indices 0 to n − 1.
        class_names: One per class.
        kind: The data set's name.
        split: What it calls the split.
    """

    def __init__(
        self,
        image: Callable[[int], Tensor],
        labels: Tensor,
        class_names: Sequence[str],
        kind: str,
        split: str,
    ):
        self.image, self.labels, self.kind = image, labels, kind
        self.class_names = dict(enumerate(class_names))
        self.name, self.count = f"{kind} {split}", len(labels)
        _, height, width = image(0).shape
        self.image_size = (height, width)

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the images of ascending ids, None for all."""
        rows = list(range(self.count)) if ids is None else ids.tolist()
        for start in range(0, len(rows), batch_size):
            yield torch.stack([self.image(row) for row in rows[start : start + batch_size]])

    def identity(self) -> dict[str, Any]:
        """Returns the hash of the images."""
        return {"kind": self.kind, "images": self.sha256, "count": self.count}

    @property
    def sha256(self) -> str:
        """The hash of the images, which other versions of the libraries that draw them may change."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        """As `digest_of` has it, without all images in memory."""
        digest = hashlib.sha256(f"torch.uint8 {(self.count, 3, *self.image_size)}".encode())
        for images in self.batches(HASHED_AT_ONCE):
            digest.update(images.numpy().tobytes())
        return digest.hexdigest()

    def recipe(self) -> dict[str, Any]:
        """Returns name and count."""
        return {"source": self.name, "num_images": self.count, "labels": label_mode(self.labels)}
