"""The metrics of the samples' logits: `is`, the inception score, and `accuracy`."""

from __future__ import annotations

from torch import Tensor

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import SPLIT_SIZE, inception_score
from flashdit.evaluation.metrics.metric import METRICS, Metric, Score, Unavailable, known
from flashdit.shared.registry import counted


def class_score(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float | Unavailable, ...]:
    """Returns mean and standard deviation over chunks of the inception score of the samples."""
    logits = known(samples.logits, samples, "logits")
    mean, deviation = inception_score(logits)
    if len(logits) <= SPLIT_SIZE:
        return mean, Unavailable(
            f"{counted(len(logits), 'image')} are one chunk of {SPLIT_SIZE:,}, which has no spread"
        )
    return mean, deviation


def order_cautions(samples: ImageStatistics, reference: ImageStatistics) -> list[str]:
    """Returns a sentence where the samples are sorted by class."""
    if samples.labels is not None:
        classes = samples.labels
    elif samples.logits is not None:  # as the extractor sees them
        classes = samples.logits.argmax(1)
    else:
        return []
    if len(classes) <= SPLIT_SIZE or not mostly_sorted(classes):
        return []
    return [
        f"the samples are sorted by class: over chunks of {SPLIT_SIZE:,} their inception score is far "
        "below that of the same samples in random order"
    ]


def mostly_sorted(classes: Tensor) -> bool:
    """Returns whether neighbours (n,) are of one class far more often than in random order."""
    shares = classes.unique(return_counts=True)[1].double() / len(classes)
    chance = shares.square().sum()
    return len(shares) > 1 and bool((classes.diff() == 0).double().mean() > (1 + chance) / 2)


def class_accuracy(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the share of samples that the extractor takes for the class they were made as."""
    labels = known(samples.labels, samples, "labels")
    return ((known(samples.logits, samples, "logits").argmax(1) == labels).double().mean().item(),)


METRICS.add(
    "is",
    Metric(
        compute=class_score,
        needs=("logits",),
        scores=(
            Score(key="is_mean", label="IS[{extractor}]", inception=("is_mean", "IS"), better="higher"),
            Score(key="is_std", label="IS[{extractor}] std", inception=("is_std", "IS std")),
        ),
        order=2,
        cautions=order_cautions,
    ),
)
METRICS.add(
    "accuracy",
    Metric(
        compute=class_accuracy,
        needs=("logits",),
        scores=(Score(key="accuracy", better="higher"),),
        order=6,
        needs_classes=True,
    ),
)
