"""The letters' classifier as the extractor of scores."""

from __future__ import annotations

from dataclasses import dataclass

from flashdit.evaluation.features.extractor import EXTRACTORS, SPATIAL_CHANNELS
from flashdit.evaluation.features.iwin_classifier import IwinClassifierExtractor
from flashdit.glyphs.classifier import GLYPHS_WEIGHTS, glyphs_config
from flashdit.glyphs.fonts import LETTER_NAMES


@dataclass(kw_only=True)
class GlyphsExtractorOptions:
    """The letters' classifier has no options."""


@EXTRACTORS.register("glyphs", GlyphsExtractorOptions)
class GlyphsExtractor(IwinClassifierExtractor):
    """The committed classifier of letters: pool (96), spatial (112), logits (26) over the letters."""

    name = "glyphs"
    pool_dimensions = 96
    spatial_dimensions = 4 * 4 * SPATIAL_CHANNELS
    class_names = LETTER_NAMES
    colours = "colour"

    def __init__(self, options: GlyphsExtractorOptions):
        super().__init__(glyphs_config(), GLYPHS_WEIGHTS)
