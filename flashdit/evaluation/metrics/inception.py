"""How sure and how varied a classifier finds images: the inception score of their logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashdit.evaluation.metrics.inputs import finite_double

SPLIT_SIZE = 5000  # rows per chunk of the inception score


def inception_score(logits: Any, split_size: int = SPLIT_SIZE) -> tuple[float, float]:
    """Returns mean and population standard deviation of exp E KL(p(y|x) ‖ p(y)) over consecutive chunks.

    Rows should be in random order: sorted by class they score a fraction of it.

    Args:
        logits: (n, classes), array or tensor; ADM takes Inception's without the bias.
        split_size: Rows per chunk; the last chunk may be shorter.

    Raises:
        ValueError: If there are no rows, split_size is not positive, or a logit is not finite.

    Source: Salimans et al., "Improved techniques for training GANs"; chunks as in ADM's evaluator.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric  # 3 s to import

    logits = finite_double(logits, "logits")
    if split_size < 1 or logits.ndim != 2 or not logits.numel():
        shape = tuple(logits.shape)
        raise ValueError(
            f"inception score needs logits (n, classes) and split_size ≥ 1, got {shape=}, {split_size=}"
        )
    scores = []
    for chunk in logits.split(split_size):
        score = isc_features_to_metric(chunk, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        if not math.isfinite(score):
            # A class of probability 0 on the whole adds 0 · log 0 = 0, which floating point calls NaN.
            possible = chunk.softmax(dim=1).mean(dim=0) > 0
            score = isc_features_to_metric(chunk[:, possible], splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        scores.append(score)
    return float(np.mean(scores)), float(np.std(scores))
