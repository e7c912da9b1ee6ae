"""The digits as images that samples are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.evaluation.images.reading import label_mode
from flashdit.evaluation.images.sources import digest_of


class DigitsSource:
    """One split of the embedded digits, `train` or `held-out`."""

    def __init__(self, split: str):
        images, labels = digits(split)
        self.images, self.labels, self.class_names = images, labels, dict(enumerate(DIGIT_NAMES))
        self.name, self.count = f"digits {split}", len(images)
        self.image_size = (images.shape[2], images.shape[3])

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the images of ascending ids, None for all."""
        yield from (self.images if ids is None else self.images[ids]).split(batch_size)

    def identity(self) -> dict[str, Any]:
        """Returns the hash of the images."""
        return {"kind": "digits", "images": self.sha256, "count": self.count}

    @property
    def sha256(self) -> str:
        """The hash of the images."""
        return digest_of([self.images])

    def recipe(self) -> dict[str, Any]:
        """Returns name and count."""
        return {"source": self.name, "num_images": self.count, "labels": label_mode(self.labels)}
