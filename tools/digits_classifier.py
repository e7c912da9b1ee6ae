"""Trains the committed digits classifier: `python -m tools.digits_classifier`, about two minutes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdit.digits.classifier import DIGITS_WEIGHTS, digits_config
from flashdit.digits.images import digits
from flashdit.evaluation.features.iwin_classifier import IwinClassifier, accuracy_of
from tools.classifiers import features_of, fit, floor_of, save

SEED = 0
EPOCHS = 60
BATCH_SIZE = 64
MAX_ROTATION = math.radians(10)
MAX_SHIFT = 0.1  # of half the image side
SCALES = (0.9, 1.1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images uint8 (b, 3, h, w), each rotated, scaled and shifted a little around its centre."""

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=generator) * (high - low) + low

    angle, scale = draw(-MAX_ROTATION, MAX_ROTATION), draw(*SCALES)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [cos, -sin, draw(-MAX_SHIFT, MAX_SHIFT), sin, cos, draw(-MAX_SHIFT, MAX_SHIFT)]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    places = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), places, padding_mode="border", align_corners=False).to(torch.uint8)


def batches(epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields augmented batches of the training split; a last short one of an epoch is left out."""
    generator = torch.Generator().manual_seed(SEED)
    images, labels = digits("train")
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(BATCH_SIZE)[: len(images) // BATCH_SIZE]:
            yield augment(images[rows], generator), labels[rows]


def train(epochs: int = EPOCHS) -> IwinClassifier:
    """Returns the classifier trained on the training split; the same machine gives the same weights."""
    torch.manual_seed(SEED)
    steps = epochs * (len(digits("train")[0]) // BATCH_SIZE)
    return fit(IwinClassifier(digits_config()), batches(epochs), steps, "digits classifier")


def describe(classifier: IwinClassifier) -> str:
    """Returns what the classifier is worth: accuracies, and the scores of real training images as samples."""
    train, held_out = digits("train"), digits("held-out")
    accuracies = (
        f"accuracy  held-out {accuracy_of(classifier, *held_out):.4f}"
        f"  train {accuracy_of(classifier, *train):.4f}"
    )
    features = features_of(classifier, held_out[0]), features_of(classifier, train[0])
    return f"{accuracies}\n{floor_of(*features)}"


def main() -> None:
    """Trains, prints what came out and saves the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the bytes of the weights, follow the threads
    classifier = train(arguments.epochs)
    print(describe(classifier))
    save(classifier, arguments.output)


if __name__ == "__main__":
    main()
