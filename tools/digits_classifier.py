"""Trains the committed digits classifier: `python -m tools.digits_classifier`, about two minutes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import trange

from flashdit.digits.classifier import DIGITS_WEIGHTS, DigitsClassifier, accuracy_of
from flashdit.digits.images import digits
from flashdit.evaluation.metrics import frechet_distance, precision_recall
from flashdit.shared.files import write_atomically
from flashdit.shared.moments import Moments

SEED = 0
EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
MAX_NORM = 1.0
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


def train(epochs: int = EPOCHS) -> DigitsClassifier:
    """Returns the classifier trained on the training split; the same machine gives the same weights."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, labels = digits("train")
    classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in (progress := trange(epochs, desc="digits classifier", unit="epoch")):
        loss = torch.zeros(())
        for rows in torch.randperm(len(images), generator=generator).split(BATCH_SIZE)[: steps // epochs]:
            logits = classifier(augment(images[rows], generator))["logits"]
            loss = F.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(classifier.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return classifier.eval().requires_grad_(False)


def describe(classifier: DigitsClassifier) -> str:
    """Returns what the classifier is worth: accuracies, and the scores of real training images as samples."""
    (train_images, train_labels), (held_out_images, held_out_labels) = digits("train"), digits("held-out")
    samples, reference = classifier(train_images), classifier(held_out_images)
    distances = {}
    for kind in ("pool", "spatial"):
        moments = []
        for features in (reference[kind], samples[kind]):
            moments.append(Moments(features.shape[1]))
            moments[-1].add(features)
        real, fake = moments
        statistics = (real.mean, real.covariance, fake.mean, fake.covariance)
        distances[kind] = frechet_distance(*statistics, real.count, fake.count)
    precision, recall = precision_recall(reference["pool"], samples["pool"])
    return (
        f"accuracy  held-out {accuracy_of(classifier, held_out_images, held_out_labels):.4f}"
        f"  train {accuracy_of(classifier, train_images, train_labels):.4f}\n"
        f"floor (train as samples, held-out as reference)  FD {distances['pool']:.5f}"
        f"  sFD {distances['spatial']:.5f}  precision {precision:.4f}  recall {recall:.4f}"
    )


def main() -> None:
    """Trains, prints what came out and saves the weights (temp + rename)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and so the bytes of the weights, follow the threads
    classifier = train(arguments.epochs)
    print(describe(classifier))
    write_atomically(arguments.output, lambda temporary: save_file(classifier.state_dict(), temporary))
    print(f"saved {arguments.output} ({arguments.output.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
