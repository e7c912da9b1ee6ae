"""The digits classifier as the extractor of scores."""

from __future__ import annotations

from dataclasses import dataclass

from flashdit.digits.classifier import DIGITS_WEIGHTS, digits_config
from flashdit.digits.images import DIGIT_NAMES
from flashdit.evaluation.features.extractor import EXTRACTORS, SPATIAL_CHANNELS
from flashdit.evaluation.features.iwin_classifier import IwinClassifierExtractor


@dataclass(kw_only=True)
class DigitsExtractorOptions:
    """The digits classifier has no options."""


@EXTRACTORS.register("digits", DigitsExtractorOptions)
class DigitsExtractor(IwinClassifierExtractor):
    """The committed digits classifier: pool (64), spatial (112), logits (10) over the digits' own classes."""

    name = "digits"
    pool_dimensions = 64
    spatial_dimensions = 4 * 4 * SPATIAL_CHANNELS
    class_names = DIGIT_NAMES
    colours = "grey"

    def __init__(self, options: DigitsExtractorOptions):
        super().__init__(digits_config(), DIGITS_WEIGHTS)
