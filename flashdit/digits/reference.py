"""The digits as images that samples are compared with."""

from __future__ import annotations

from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.evaluation.images.datasets import DatasetSource


class DigitsSource(DatasetSource):
    """One split of the embedded digits, `train` or `held-out`."""

    def __init__(self, split: str):
        self.images, labels = digits(split)
        super().__init__(lambda index: self.images[index], labels, DIGIT_NAMES, "digits", split)
