"""Letters as a data set, with everything that a data set can bring."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flashdit.data.sources import DATASETS, Companions
from flashdit.evaluation.images.datasets import DatasetSource
from flashdit.glyphs.drawing import GROUNDS, draw, draw_numbers
from flashdit.glyphs.fonts import HELD_OUT_FAMILIES, LETTER_NAMES, LETTERS, TRAINING_FAMILIES
from flashdit.shared.registry import unknown

FAMILIES_OF = {"train": TRAINING_FAMILIES, "held-out": TRAINING_FAMILIES, "families": HELD_OUT_FAMILIES}
SIDE_BOUNDS = (32, 256)
"""Least and most, in pixels of a side."""
MOST_DRAWINGS = 10_000_000
COMPARED = 1300
"""Drawings of the reference and of the floor, and samples that are scored: distances ask for equal counts."""


@dataclass(kw_only=True)
class GlyphsOptions:
    """Options of the letters."""

    image_size: int = 64
    """Side of an image in pixels, 32 to 256."""
    ground: str = "plain"
    """What a letter stands on: `plain`, `photograph`, or `both`, each half the time."""
    split: str = "train"
    """`train`; `held-out`, other drawings of the same fonts; or `families`, fonts of other families."""
    num_images: int = 26_000
    """How many there are; letter by letter, so that all classes are alike."""

    def __post_init__(self):
        low, high = SIDE_BOUNDS
        if not low <= self.image_size <= high:
            raise ValueError(f"data.image_size of glyphs must be from {low} to {high}, got {self.image_size}")
        if not len(LETTERS) <= self.num_images <= MOST_DRAWINGS:
            raise ValueError(
                f"data.num_images must be from {len(LETTERS)}, one of each letter, to {MOST_DRAWINGS:,}, "
                f"got {self.num_images}"
            )
        if self.ground not in GROUNDS:
            raise unknown("data.ground", self.ground, GROUNDS)
        if self.split not in FAMILIES_OF:
            raise unknown("data.split", self.split, FAMILIES_OF)


@DATASETS.register("glyphs", GlyphsOptions)
class Glyphs:
    """The 26 capital letters in the text fonts of matplotlib, each image drawn when it is asked for."""

    mirrors = False

    @staticmethod
    def companions(options: GlyphsOptions) -> Companions:
        """Returns what goes with letters of this size on this ground; with families, of those families."""
        reference = "families" if options.split == "families" else "held-out"
        return Companions(
            autoencoder=Path(__file__).parent / "assets" / "autoencoder",
            reference=partial(split_as_source, options, reference),
            floor=partial(split_as_source, options, "train"),
            extractor="glyphs",
            num_images=COMPARED,
        )

    def __init__(self, options: GlyphsOptions):
        self.options = options
        self.class_names = LETTER_NAMES
        self.labels = torch.arange(options.num_images) % len(LETTERS)

    def image(self, index: int) -> Tensor:
        """Returns one image, uint8 (3, S, S)."""
        options = self.options
        drawing = draw_numbers(options.split, index, FAMILIES_OF[options.split], options.ground)
        return draw(drawing, options.image_size)


def split_as_source(options: GlyphsOptions, split: str) -> DatasetSource:
    """Returns the first `COMPARED` drawings of a split as images that samples are compared with."""
    glyphs = Glyphs(replace(options, split=split, num_images=COMPARED))
    return DatasetSource(glyphs.image, glyphs.labels, glyphs.class_names, "glyphs", split)
