"""The metrics of the samples' logits: `is`, the inception score, and `accuracy`."""

from __future__ import annotations

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import SPLIT_SIZE, inception_score
from flashdit.evaluation.metrics.metric import METRICS, Metric, Score, known


def class_score(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns mean and standard deviation of the inception score of the samples."""
    return inception_score(known(samples.logits, samples, "logits"))


def order_cautions(samples: ImageStatistics, reference: ImageStatistics) -> list[str]:
    """Returns a sentence where the samples are sorted by class."""
    labels = samples.labels
    if labels is None or len(labels) <= SPLIT_SIZE or bool((labels.diff() < 0).any()):
        return []
    return [
        f"the samples are sorted by class: over chunks of {SPLIT_SIZE:,} their inception score is far "
        "below that of the same samples in random order"
    ]


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
