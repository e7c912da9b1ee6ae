"""Trains the committed classifier of letters: `python -m tools.glyphs_classifier`, about ten minutes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from flashdit.evaluation.features.iwin_classifier import IwinClassifier
from flashdit.glyphs.classifier import GLYPHS_WEIGHTS, glyphs_config
from flashdit.glyphs.dataset import Glyphs, GlyphsOptions
from tools.classifiers import features_of, fit, floor_of, save

SEED = 0
STEPS = 2400
BATCH_SIZE = 78  # three of each letter
SIZES = (32, 48, 64, 96, 128)
"""Sides of the drawings in pixels, one a batch: the classifier resizes them to its own."""
MAX_NOISE = 12.0
"""Standard deviation of the noise that is added to an image, in grey levels, at the most."""
MEASURED = 2600
"""Drawings of each set that is measured."""


def drawings(count: int, **options: object) -> tuple[Tensor, Tensor]:
    """Returns the first drawings of a split, images and labels."""
    glyphs = Glyphs(GlyphsOptions(num_images=count, **options))  # pyright: ignore[reportArgumentType]
    return torch.stack([glyphs.image(index) for index in range(count)]), glyphs.labels


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of training drawings on either ground, each one with some noise; none comes twice."""
    generator = torch.Generator().manual_seed(SEED)
    options = {"num_images": steps * BATCH_SIZE, "ground": "both"}
    sources = [Glyphs(GlyphsOptions(image_size=size, **options)) for size in SIZES]  # pyright: ignore
    for step in range(steps):
        source = sources[step % len(sources)]
        rows = range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        images = torch.stack([source.image(row) for row in rows]).float()
        sigma = MAX_NOISE * torch.rand(BATCH_SIZE, 1, 1, 1, generator=generator)
        noise = sigma * torch.randn(images.shape, generator=generator)
        yield (images + noise).clamp(0, 255), source.labels[rows.start : rows.stop]


def train(steps: int = STEPS) -> IwinClassifier:
    """Returns the classifier trained on the training split; the same machine gives the same weights."""
    torch.manual_seed(SEED)
    return fit(IwinClassifier(glyphs_config()), batches(steps), steps, "glyphs classifier")


def describe(classifier: IwinClassifier) -> str:
    """Returns what the classifier is worth: accuracies, and the scores of real training images as samples."""
    lines = []
    for ground in ("plain", "photograph"):
        for size in (32, 64, 256):
            accuracies = []
            for split in ("held-out", "families"):
                images, labels = drawings(MEASURED, split=split, ground=ground, image_size=size)
                accuracy = (features_of(classifier, images)["logits"].argmax(1) == labels).float().mean()
                accuracies.append(f"{split} {accuracy:.4f}")
            lines.append(f"accuracy  {ground}, {size} px  {'  '.join(accuracies)}")
        held_out, train = (
            features_of(classifier, drawings(MEASURED, split=split, ground=ground)[0])
            for split in ("held-out", "train")
        )
        lines.append(floor_of(held_out, train))
    return "\n".join(lines)


def main() -> None:
    """Trains, prints what came out and saves the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=GLYPHS_WEIGHTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the bytes of the weights, follow the threads
    classifier = train(arguments.steps)
    print(describe(classifier))
    save(classifier, arguments.output)


if __name__ == "__main__":
    main()
