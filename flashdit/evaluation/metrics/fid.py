"""The metrics `fid` and `sfid`: Fréchet distances of the pool and of the spatial features."""

from __future__ import annotations

from functools import partial

from flashdit.evaluation.features.statistics import ImageStatistics
from flashdit.evaluation.metrics import frechet_distance
from flashdit.evaluation.metrics.metric import METRICS, Metric, Score, Unavailable, known


def distance(
    mean: str, covariance: str, kind: str, samples: ImageStatistics, reference: ImageStatistics
) -> tuple[float, ...]:
    """Returns the Fréchet distance of two sets.

    Args:
        mean: Field of the statistics.
        covariance: Field of the statistics.
        kind: Of the features, where there are none.
        samples: What is scored; what they lack, their extractor does not give.
        reference: What it is compared with.
    """
    if getattr(samples, mean) is None:
        raise Unavailable(f"the extractor has no {kind} features")
    mu, sigma = (
        known(getattr(reference, name), reference, f"{kind} statistics") for name in (mean, covariance)
    )
    of_samples = getattr(samples, mean), getattr(samples, covariance)
    return (frechet_distance(mu, sigma, *of_samples, reference.count, samples.count),)


def pool_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the Fréchet distance of the pool features."""
    return distance("mu", "sigma", "pool", samples, reference)


def spatial_distance(samples: ImageStatistics, reference: ImageStatistics) -> tuple[float, ...]:
    """Returns the Fréchet distance of the spatial features."""
    return distance("mu_s", "sigma_s", "spatial", samples, reference)


def rank_cautions(mean: str, samples: ImageStatistics, reference: ImageStatistics) -> list[str]:
    """Returns one sentence of all sets with too few images for a covariance, the same for both distances."""
    if getattr(samples, mean) is None:
        return []
    means = [mu for mu in (samples.mu, samples.mu_s) if mu is not None]
    found = []
    for side in (samples, reference):
        few = [str(mu.numel()) for mu in means if side.count is not None and side.count <= mu.numel()]
        verb = "" if found else "is rank-deficient "
        if few:
            found.append(f"of {side.count} images of '{side.name}' {verb}in {' and '.join(few)} dimensions")
    if not found:
        return []
    return [
        f"the covariance {', that '.join(found)}: compare Fréchet distances only at the same number of images"
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
