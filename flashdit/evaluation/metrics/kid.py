"""The metric `kid`: the kernel distance of the pool features."""

from __future__ import annotations

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import kernel_distance
from flashdit.evaluation.metrics.metric import METRICS, Metric, Score, pool_rows

KERNEL_SUBSET = 1000  # rows of a subset; all of a smaller set


def pool_kernel_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns mean and standard deviation over subsets of the kernel distance of the pool features."""
    real, fake = pool_rows(reference), pool_rows(samples)
    return kernel_distance(real, fake, subset_size=min(KERNEL_SUBSET, len(real), len(fake)))


METRICS.add(
    "kid",
    Metric(
        compute=pool_kernel_distance,
        needs=("pool",),
        scores=(
            Score(
                key="kid",
                label="KD[{extractor}]",
                stem="kd",
                inception=("kid", "KID"),
                column="kernel_distance",
                counted=True,
                better="lower",
            ),
            Score(
                key="kid_std",
                label="KD[{extractor}] std",
                stem="kd_std",
                inception=("kid_std", "KID std"),
                column="kernel_distance_std",
                counted=True,
            ),
        ),
        order=5,
        by_default=False,
    ),
)
