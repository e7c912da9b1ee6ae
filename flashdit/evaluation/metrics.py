"""What the scores are: Fréchet distance, inception score, precision and recall, of features as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  # k of precision and recall
SPLIT_SIZE = 5000  # rows per chunk of the inception score
POINT_ROWS, CENTRE_ROWS = 2048, 8192  # a tile of distances: 128 MiB in float64
ROUNDING = 1e-13  # of |u|² + |v|²: above the error of a distance in float64, below any gap that is not a tie


def as_tensor(values: Any) -> Tensor:
    """Returns a NumPy array or a tensor as a tensor, copied only where it must be."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.require(values, requirements="W"))


def finite_double(values: Any, what: str) -> Tensor:
    """Returns the values as a float64 tensor; anything not finite is refused by name."""
    values = as_tensor(values).double()
    if not values.isfinite().all():
        raise ValueError(f"{what} must be finite, got {int((~values.isfinite()).sum())} entries that are not")
    return values


def frechet_distance(
    mu1: Any, sigma1: Any, mu2: Any, sigma2: Any, n1: int | None = None, n2: int | None = None
) -> float:
    """Returns the Fréchet distance of two Gaussians, |μ1 − μ2|² + tr Σ1 + tr Σ2 − 2 tr (Σ1 Σ2)^½.

    The last term is the sum of the roots of the eigenvalues of Aᵀ Σ2 A with Σ1 = A Aᵀ, a symmetric problem
    that is always real. A covariance of n rows has rank n − 1 at most; where that is less than the
    dimensions, only as many eigenvalues are summed as can be there, and the rest, pure rounding, is left out.

    Args:
        mu1: Mean (d,), array or tensor.
        sigma1: Covariance (d, d).
        mu2: Mean (d,).
        sigma2: Covariance (d, d).
        n1: Rows that sigma1 was computed from; None means unknown, and as many as you like.
        n2: Rows that sigma2 was computed from.

    Returns:
        The signed distance: rounding may leave a tiny negative number for equal sets.

    Raises:
        ValueError: If shapes do not agree or an entry is not finite.

    Source: Heusel et al., "GANs trained by a two time-scale update rule", eq. 6.
    """
    mu1, mu2 = finite_double(mu1, "mu1"), finite_double(mu2, "mu2")
    sigma1, sigma2 = finite_double(sigma1, "sigma1"), finite_double(sigma2, "sigma2")
    shapes = [tuple(part.shape) for part in (mu1, sigma1, mu2, sigma2)]
    d = mu1.numel()
    if shapes != [(d,), (d, d), (d,), (d, d)]:
        raise ValueError(f"means must be (d,) and covariances (d, d) with one d, got shapes {shapes}")
    rank = min([d, *(n - 1 for n in (n1, n2) if n is not None)])
    eigenvalues, vectors = torch.linalg.eigh(sigma1)
    a = vectors * eigenvalues.clamp(min=0).sqrt()  # sigma1 = a aᵀ
    product = a.T @ sigma2 @ a
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt()  # ascending
    trace_of_root = roots[d - rank :].sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_of_root).item()


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
        # A class whose probability is 0 in every row adds 0 · log 0 = 0, which floating point calls NaN.
        possible = chunk.softmax(dim=1).amax(dim=0) > 0
        scores.append(
            isc_features_to_metric(chunk[:, possible], splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        )
    return float(np.mean(scores)), float(np.std(scores))


def squared_distances(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns |u − v|² of every pair, (rows of u, rows of v), and the rounding each may carry."""
    norms = u.square().sum(1)[:, None] + v.square().sum(1)[None]
    return torch.addmm(norms, u, v.T, alpha=-2).clamp_(min=0), norms.mul_(ROUNDING)


def squared_radii(features: Tensor, origin: Tensor, k: int) -> Tensor:
    """Returns (n,) squared distances to the k-th nearest other row of the same set (n, d), tile by tile."""
    radii = []
    for points in features.split(POINT_ROWS):
        points = points.double() - origin
        nearest = points.new_empty(len(points), 0)
        for others in features.split(CENTRE_ROWS):
            distances, _ = squared_distances(points, others.double() - origin)
            candidates = torch.cat([nearest, distances], dim=1)
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), largest=False).values
        radii.append(nearest.amax(dim=1))  # k + 1 with itself: the largest is the k-th neighbour's
    return torch.cat(radii)


def covered_share(points: Tensor, centres: Tensor, origin: Tensor, k: int) -> float:
    """Returns the share of points (n, d) inside the k-nearest-neighbour ball of a centre (m, d) or more."""
    radii = squared_radii(centres, origin, k)
    hits = 0
    for block in points.split(POINT_ROWS):
        block = block.double() - origin
        inside = torch.zeros(len(block), dtype=torch.bool, device=block.device)
        for others, others_radii in zip(centres.split(CENTRE_ROWS), radii.split(CENTRE_ROWS), strict=True):
            distances, rounding = squared_distances(block, others.double() - origin)
            inside |= (distances <= others_radii + rounding).any(dim=1)
        hits += int(inside.sum())
    return hits / len(points)


def checked_sets(real: Any, fake: Any, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns both sets as tensors and the mean of the real one, having checked that k neighbours exist."""
    real, fake = as_tensor(real), as_tensor(fake)
    shapes = tuple(real.shape), tuple(fake.shape)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"precision and recall need features (n, d) with one d, got shapes {shapes}")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            "precision and recall need 1 ≤ k and more than k images in each set, "
            f"got {k=}, real={len(real)}, fake={len(fake)}"
        )
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError(f"precision and recall need finite features, got NaN or infinity in shapes {shapes}")
    return real, fake, real.mean(dim=0, dtype=torch.float64)


def precision(real: Any, fake: Any, k: int = NEIGHBOURS) -> float:
    """Returns the share of fake rows inside a ball of a real row; arguments as in `precision_recall`."""
    real, fake, origin = checked_sets(real, fake, k)
    return covered_share(fake, real, origin, k)


def recall(real: Any, fake: Any, k: int = NEIGHBOURS) -> float:
    """Returns the share of real rows inside a ball of a fake row; arguments as in `precision_recall`."""
    real, fake, origin = checked_sets(real, fake, k)
    return covered_share(real, fake, origin, k)


def precision_recall(real: Any, fake: Any, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Returns precision and recall: how much of each set lies on the manifold of the other.

    A ball reaches to its centre's k-th nearest neighbour in its own set, border included. Distances are
    float64 and centred on the real mean, so counts are exact; memory is the features and a few tiles.

    Args:
        real: Reference features (n, d), array or tensor.
        fake: Features (m, d) of the samples.
        k: Which neighbour sets the radius.

    Raises:
        ValueError: If a set has no k-th neighbour, shapes do not agree or an entry is not finite.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models".
    """
    return precision(real, fake, k), recall(real, fake, k)
