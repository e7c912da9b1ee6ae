"""The metrics `precision` and `recall`: which share of one set lies in the other one's manifold."""

from __future__ import annotations

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import NEIGHBOURS, precision, precision_recall, recall
from flashdit.evaluation.metrics.metric import METRICS, Metric, Score, pool_rows

PANEL = "precision and recall"


def sample_precision(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the share of samples inside the reference's manifold."""
    return (precision(pool_rows(reference), pool_rows(samples)),)


def sample_recall(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the share of the reference inside the samples' manifold."""
    return (recall(pool_rows(reference), pool_rows(samples)),)


def both_shares(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns precision and recall, having met each pair of images once."""
    return precision_recall(pool_rows(reference), pool_rows(samples))


METRICS.add(
    "precision",
    Metric(
        compute=sample_precision,
        needs=("pool",),
        scores=(Score(key="precision", better="higher", panel=PANEL),),
        order=3,
        least_images=NEIGHBOURS + 1,
        together=("recall", both_shares),
    ),
)
METRICS.add(
    "recall",
    Metric(
        compute=sample_recall,
        needs=("pool",),
        scores=(Score(key="recall", better="higher", panel=PANEL),),
        order=4,
        least_images=NEIGHBOURS + 1,
    ),
)
