"""Training of the committed classifiers of embedded data, and what they are worth as extractors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from flashdit.evaluation.features.iwin_classifier import IwinClassifier
from flashdit.evaluation.metrics import frechet_distance, precision_recall
from flashdit.shared.files import write_atomically
from flashdit.shared.moments import Moments

LEARNING_RATE = 3e-3
MAX_NORM = 1.0
AT_ONCE = 400
"""Images of a forward pass that measures."""


def fit(
    classifier: IwinClassifier, batches: Iterator[tuple[Tensor, Tensor]], steps: int, name: str
) -> IwinClassifier:
    """Returns the classifier trained on batches of images and labels, one a step."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for images, labels in (progress := tqdm(batches, desc=name, unit="step", total=steps, mininterval=5)):
        loss = F.cross_entropy(classifier(images)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(classifier.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def features_of(classifier: IwinClassifier, images: Tensor) -> dict[str, Tensor]:
    """Returns the features of any number of images."""
    parts = [classifier(batch) for batch in images.split(AT_ONCE)]
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


def floor_of(reference: dict[str, Tensor], samples: dict[str, Tensor]) -> str:
    """Returns the scores of real training images as samples, from the features of both sets."""
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
        f"floor (train as samples, held-out as reference)  FD {distances['pool']:.5f}"
        f"  sFD {distances['spatial']:.5f}  precision {precision:.4f}  recall {recall:.4f}"
    )


def save(classifier: IwinClassifier, path: Path) -> None:
    """Writes the weights (temp + rename)."""
    write_atomically(path, lambda temporary: save_file(classifier.state_dict(), temporary))
    print(f"saved {path} ({path.stat().st_size / 1000:.0f} kB)")
