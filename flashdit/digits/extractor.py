"""The digits classifier as the extractor of scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashdit.digits.classifier import DIGITS_WEIGHTS, load_digits_classifier
from flashdit.digits.images import DIGIT_NAMES
from flashdit.evaluation.features.extractor import EXTRACTORS, SPATIAL_CHANNELS, Extractor
from flashdit.shared.files import file_sha256


@dataclass(kw_only=True)
class DigitsExtractorOptions:
    """The digits classifier has no options."""


@EXTRACTORS.register("digits", DigitsExtractorOptions)
class DigitsExtractor(Extractor):
    """The committed digits classifier: pool (64), spatial (112), logits (10) over the digits' own classes."""

    name = "digits"
    pool_dimensions = 64
    spatial_dimensions = 4 * 4 * SPATIAL_CHANNELS
    resize = "bilinear, antialiased, to 32×32"
    class_names = DIGIT_NAMES
    colours = "grey"

    def __init__(self, options: DigitsExtractorOptions):
        super().__init__()
        self.network = load_digits_classifier()
        self.weights_sha256 = file_sha256(DIGITS_WEIGHTS)

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Returns the features."""
        return dict(self.network(images))
