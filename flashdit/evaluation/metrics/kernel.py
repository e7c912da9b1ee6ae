"""How far apart two sets of features are without a Gaussian: the kernel distance of random subsets."""

from __future__ import annotations

from typing import Any

from flashdit.evaluation.metrics.inputs import finite_pair


def kernel_distance(
    real: Any, fake: Any, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Returns mean and population standard deviation of the squared MMD, unbiased, of random subsets.

    The kernel is (xᵀy / d + 1)³; subsets are drawn without replacement, by a generator of their own.

    Args:
        real: Reference features (n, d), array or tensor.
        fake: Features (m, d) of the samples.
        subsets: How many pairs of subsets are compared.
        subset_size: Rows of each; the expectation does not depend on it, the spread does.
        seed: Of the draws.

    Returns:
        The signed mean, which may be slightly negative for like sets, and the standard deviation.

    Raises:
        ValueError: If a set is smaller than subset_size, shapes do not agree or an entry is no finite float.

    Source: Bińkowski et al., "Demystifying MMD GANs"; computed by torch-fidelity.
    """
    from torch_fidelity.metric_kid import (  # 3 s to import
        KEY_METRIC_KID_MEAN,
        KEY_METRIC_KID_STD,
        kid_features_to_metric,
    )

    real, fake = finite_pair(real, fake, "kernel distance")
    if subsets < 1 or not 2 <= subset_size <= min(len(real), len(fake)):
        raise ValueError(
            "kernel distance needs subsets ≥ 1 and 2 ≤ subset_size ≤ the images of each set, "
            f"got {subsets=}, {subset_size=}, real={len(real)}, fake={len(fake)}"
        )
    options = {"kid_subsets": subsets, "kid_subset_size": subset_size, "rng_seed": seed, "verbose": False}
    result = kid_features_to_metric(fake.double().cpu(), real.double().cpu(), **options)
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]
