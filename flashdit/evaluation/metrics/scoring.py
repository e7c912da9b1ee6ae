"""Which score reads which statistics: the table of metrics, by the names of `--metrics`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from torch import Tensor

from flashdit.evaluation.features.features import Extractor
from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import (
    NEIGHBOURS,
    SPLIT_SIZE,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision,
    precision_recall,
    recall,
)
from flashdit.shared.registry import unknown

Value = TypeVar("Value")

KERNEL_SUBSET = 1000  # rows of a subset of the kernel distance; all of a smaller set


class Unavailable(Exception):
    """Says why a score cannot be had from these statistics."""


@dataclass(kw_only=True)
class Scores:
    """Numbers by key; None where there is none, with the reason.

    Attributes:
        count: How many images were scored.
        values: Keys of the metrics, in their order.
        reasons: Why a value is None.
    """

    count: int
    values: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class Metric(NamedTuple):
    """A score: the parts of `collect` it reads, the keys it reports, (samples, reference) → their numbers."""

    needs: tuple[str, ...]
    keys: tuple[str, ...]
    compute: Callable[[ImageStatistics, ImageStatistics], tuple[float, ...]]


def present(value: Value | None, statistics: ImageStatistics, what: str) -> Value:
    """Returns the value, or says what the statistics lack."""
    if value is None:
        raise Unavailable(f"'{statistics.name}' has no {what}")
    return value


def pool_rows(statistics: ImageStatistics) -> Tensor:
    """Returns the pool features of every image."""
    return present(statistics.pool, statistics, "images, only statistics")


def pool_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the Fréchet distance of the pool features."""
    mu, sample_mu = (present(side.mu, side, "pool statistics") for side in (reference, samples))
    sigma, sample_sigma = (present(side.sigma, side, "pool statistics") for side in (reference, samples))
    return (frechet_distance(mu, sigma, sample_mu, sample_sigma, reference.count, samples.count),)


def spatial_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the Fréchet distance of the spatial features."""
    mu, sample_mu = (present(side.mu_s, side, "spatial statistics") for side in (reference, samples))
    sigma, sample_sigma = (present(side.sigma_s, side, "spatial statistics") for side in (reference, samples))
    return (frechet_distance(mu, sigma, sample_mu, sample_sigma, reference.count, samples.count),)


def class_score(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns mean and standard deviation of the inception score of the samples."""
    return inception_score(present(samples.logits, samples, "logits"))


def sample_precision(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the share of samples inside the reference's manifold."""
    return (precision(pool_rows(reference), pool_rows(samples)),)


def sample_recall(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the share of the reference inside the samples' manifold."""
    return (recall(pool_rows(reference), pool_rows(samples)),)


def both_shares(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns precision and recall."""
    return precision_recall(pool_rows(reference), pool_rows(samples))


def pool_kernel_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns mean and standard deviation over subsets of the kernel distance of the pool features."""
    real, fake = pool_rows(reference), pool_rows(samples)
    return kernel_distance(real, fake, subset_size=min(KERNEL_SUBSET, len(real), len(fake)))


def class_accuracy(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the share of samples that the extractor takes for the class they were made as."""
    labels = present(samples.labels, samples, "labels")
    return ((present(samples.logits, samples, "logits").argmax(1) == labels).double().mean().item(),)


METRICS = {
    "fid": Metric(("moments",), ("fid",), pool_distance),
    "sfid": Metric(("spatial",), ("sfid",), spatial_distance),
    "is": Metric(("logits",), ("is_mean", "is_std"), class_score),
    "precision": Metric(("pool",), ("precision",), sample_precision),
    "recall": Metric(("pool",), ("recall",), sample_recall),
    "kid": Metric(("pool",), ("kid", "kid_std"), pool_kernel_distance),
    "accuracy": Metric(("logits",), ("accuracy",), class_accuracy),
}
PRECISION_RECALL = Metric(("pool",), ("precision", "recall"), both_shares)


def check_names(names: Iterable[str]) -> None:
    """Refuses an unknown metric, naming the nearest."""
    for name in names:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)


def knows_classes(extractor: Extractor, classes: Sequence[str] | None) -> bool:
    """Returns whether the extractor's logits are over the classes of the samples."""
    return extractor.class_names is not None and extractor.class_names == classes


def default_metrics(extractor: Extractor, classes: Sequence[str] | None) -> list[str]:
    """Returns every metric but KID, accuracy only where the extractor knows the classes of the samples."""
    knows = knows_classes(extractor, classes)
    return [name for name in METRICS if name != "kid" and (name != "accuracy" or knows)]


def check_accuracy(names: Collection[str], extractor: Extractor, classes: Sequence[str] | None) -> None:
    """Refuses accuracy where the extractor's logits are not over the classes of the samples."""
    if "accuracy" in names and not knows_classes(extractor, classes):
        raise ValueError(
            f"accuracy needs an extractor of the samples' own classes, got extractor '{extractor.name}'"
        )


def parts_needed(names: Iterable[str]) -> set[str]:
    """Returns which parts of `collect` the metrics read."""
    return {part for name in names for part in METRICS[name].needs}


def computations(names: Iterable[str]) -> list[Metric]:
    """Returns what computes these metrics; precision and recall together meet each pair of images once."""
    names = list(names)
    if {"precision", "recall"} <= {*names}:
        rest = [name for name in names if name != "recall"]
        return [PRECISION_RECALL if name == "precision" else METRICS[name] for name in rest]
    return [METRICS[name] for name in names]


def compute_scores(
    names: Iterable[str], samples: ImageStatistics, reference: ImageStatistics, device: str = "cpu"
) -> Scores:
    """Returns every score that the statistics allow, and the reason for every other one.

    Args:
        names: Keys of `METRICS`.
        samples: What is scored.
        reference: What it is held against.
        device: Where precision and recall are counted; changes no number.

    Raises:
        ValueError: If a metric refuses its input, such as fewer images than neighbours.
    """
    assert samples.count is not None
    scores = Scores(count=samples.count)
    if reference.pool is not None:  # the other set follows it
        reference = replace(reference, pool=reference.pool.to(device))
    for metric in computations(names):
        try:
            values: tuple[float | None, ...] = metric.compute(samples, reference)
        except Unavailable as reason:
            values = (None,) * len(metric.keys)
            scores.reasons |= dict.fromkeys(metric.keys, str(reason))
        for key, value in zip(metric.keys, values, strict=True):
            if value is not None and not math.isfinite(value):
                value, scores.reasons[key] = None, f"it came out as {value}"
            scores.values[key] = value
    return scores


def check_counts(names: Iterable[str], num_samples: int, reference: ImageStatistics) -> None:
    """Refuses too few images for the metrics, before any sample is drawn."""
    reads_neighbours = "pool" in parts_needed(names)
    least = NEIGHBOURS + 1 if reads_neighbours else 2
    counts = {"samples": num_samples}
    if reads_neighbours and reference.pool is not None:
        counts["reference"] = len(reference.pool)
    if min(counts.values()) < least:
        raise ValueError(f"these metrics need at least {least} images on each side, got {counts}")


def cautions(names: Collection[str], samples: ImageStatistics, reference: ImageStatistics) -> list[str]:
    """Returns what makes scores hard to compare: too few images for a covariance, samples sorted by class."""
    notes = []
    labels = samples.labels
    if "is" in names and labels is not None and len(labels) > SPLIT_SIZE and bool((labels.diff() >= 0).all()):
        notes.append(
            f"the samples are sorted by class: over chunks of {SPLIT_SIZE:,} their inception score is far "
            "below that of the same samples in random order"
        )
    for metric, mu in (("fid", samples.mu), ("sfid", samples.mu_s)):
        for side in (samples, reference):
            if metric in names and mu is not None and side.count is not None and side.count <= mu.numel():
                notes.append(
                    f"the covariance of {side.count} images of '{side.name}' is rank-deficient in "
                    f"{mu.numel()} dimensions: compare its Fréchet distance only at the same number of images"
                )
    return notes
