"""Features to numbers."""

from flashdit.evaluation.metrics.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    precision,
    precision_recall,
    recall,
)

__all__ = [
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision",
    "precision_recall",
    "recall",
]
