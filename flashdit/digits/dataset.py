"""The digits as a data set, with everything that a data set can bring."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from flashdit.data.sources import DATASETS, Companions
from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.digits.reference import DigitsSource


@dataclass(kw_only=True)
class DigitsOptions:
    """The embedded digits have no options."""


@DATASETS.register("digits", DigitsOptions)
class Digits:
    """The training split of scikit-learn's digits as 32×32 images."""

    companions = Companions(
        autoencoder=Path(__file__).parent / "assets" / "autoencoder",
        reference=partial(DigitsSource, "held-out"),
        floor=partial(DigitsSource, "train"),
        extractor="digits",
        num_images=1000,
    )

    def __init__(self, options: DigitsOptions):
        self.images, self.labels = digits("train")
        self.class_names = list(DIGIT_NAMES)
        self.mirrors = False

    def image(self, index: int) -> Tensor:
        """Returns one image, uint8 (3, 32, 32)."""
        return self.images[index]
