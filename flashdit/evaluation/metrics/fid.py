"""The metrics `fid` and `sfid`: Fréchet distances of the pool and of the spatial features."""

from __future__ import annotations

from functools import partial

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import frechet_distance
from flashdit.evaluation.metrics.metric import METRICS, Metric, Score, known


def distance(
    mean: str, covariance: str, what: str, samples: ImageStatistics, reference: ImageStatistics
) -> tuple[float, ...]:
    """Returns the Fréchet distance of two sets.

    Args:
        mean: Field of the statistics.
        covariance: Field of the statistics.
        what: What they are called where they are missing.
        samples: What is scored.
        reference: What it is compared with.
    """
    mu, sample_mu = (known(getattr(side, mean), side, what) for side in (reference, samples))
    sigma, sample_sigma = (known(getattr(side, covariance), side, what) for side in (reference, samples))
    return (frechet_distance(mu, sigma, sample_mu, sample_sigma, reference.count, samples.count),)


def pool_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the Fréchet distance of the pool features."""
    return distance("mu", "sigma", "pool statistics", samples, reference)


def spatial_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the Fréchet distance of the spatial features."""
    return distance("mu_s", "sigma_s", "spatial statistics", samples, reference)


def rank_cautions(mean: str, samples: ImageStatistics, reference: ImageStatistics) -> list[str]:
    """Returns a sentence for each set with too few images for its covariance."""
    mu = getattr(samples, mean)
    return [
        f"the covariance of {side.count} images of '{side.name}' is rank-deficient in {mu.numel()} "
        "dimensions: compare its Fréchet distance only at the same number of images"
        for side in (samples, reference)
        if mu is not None and side.count is not None and side.count <= mu.numel()
    ]


METRICS.add(
    "fid",
    Metric(
        compute=pool_distance,
        needs=("moments",),
        scores=(
            Score(
                key="fid",
                label="FD[{extractor}]",
                stem="fd",
                inception=("fid", "FID"),
                column="frechet",
                counted=True,
                better="lower",
            ),
        ),
        order=0,
        cautions=partial(rank_cautions, "mu"),
    ),
)
METRICS.add(
    "sfid",
    Metric(
        compute=spatial_distance,
        needs=("spatial",),
        scores=(
            Score(
                key="sfid",
                label="sFD[{extractor}]",
                stem="sfd",
                inception=("sfid", "sFID"),
                column="spatial_frechet",
                counted=True,
                better="lower",
            ),
        ),
        order=1,
        cautions=partial(rank_cautions, "mu_s"),
    ),
)
