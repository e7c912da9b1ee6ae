"""Features to numbers."""

from flashdit.evaluation.metrics.frechet import frechet_distance
from flashdit.evaluation.metrics.inception import SPLIT_SIZE, inception_score
from flashdit.evaluation.metrics.kernel import kernel_distance
from flashdit.evaluation.metrics.manifold import NEIGHBOURS, precision, precision_recall, recall

__all__ = [
    "NEIGHBOURS",
    "SPLIT_SIZE",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision",
    "precision_recall",
    "recall",
]
