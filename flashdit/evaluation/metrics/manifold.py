"""How much of each set lies on the manifold of the other: precision and recall in tiles, counted exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashdit.evaluation.metrics.distances import (
    centred_tiles,
    keep_smallest,
    mean_row,
    pair_distances,
    squared_distances,
)
from flashdit.evaluation.metrics.inputs import finite_pair

NEIGHBOURS = 3  # k of precision and recall
TINY = torch.finfo(torch.float64).tiny  # makes 0 / 0 one: a row on the centre of a ball of radius 0 is inside


def squared_radii(features: Tensor, origin: Tensor, k: int) -> Tensor:
    """Returns (n,) float64 squared distances to the k-th nearest other row of the same set (n, d).

    Args:
        features: Float rows, more than k of them.
        origin: (d,) float64 near the rows; it changes the time this takes and no radius.
        k: Which neighbour.
    """
    count = len(features)
    width = min(2 * k + 2, count - 1)  # up to k copies of every image leave no radius in doubt
    bounds = torch.full((count, width), torch.inf, dtype=torch.float64, device=features.device)
    found = torch.zeros_like(bounds, dtype=torch.int64)
    for rows, u in centred_tiles(features, origin):
        for columns, v in centred_tiles(features, origin, rows.start):  # each pair is met once
            distances, rounding = squared_distances(u, v)
            lower = distances.sub_(rounding)
            if rows == columns:
                lower.fill_diagonal_(torch.inf)  # a row is not its own neighbour
            else:
                keep_smallest(bounds[columns], found[columns], lower.T, rows.start)
            keep_smallest(bounds[rows], found[rows], lower, columns.start)
    everyone = torch.arange(count, device=features.device)
    exact = torch.stack([pair_distances(features, everyone, features, column) for column in found.T], dim=1)
    radii = exact.sort(dim=1).values[:, k - 1]
    if width < count - 1:  # rows that were not kept may be as near as the radius
        for row in ((bounds[:, -1] <= radii) & (radii > 0)).nonzero()[:, 0]:
            others = everyone[everyone != row]
            radii[row] = pair_distances(features, row.expand_as(others), features, others).kthvalue(k).values
    return radii


def covered(points: Tensor, centres: Tensor, radii: Tensor, distances: Tensor, rounding: Tensor) -> Tensor:
    """Returns (n,) whether each point lies in a ball, border included.

    Args:
        points: Features (n, d).
        centres: Features (m, d).
        radii: (m,) squared radii of the balls.
        distances: (n, m) squared distances, each to within its `rounding`.
        rounding: (n, m).
    """
    gaps = distances - radii
    inside = (gaps <= -rounding).any(dim=1)
    i, j = ((gaps <= rounding) & ~inside[:, None]).nonzero(as_tuple=True)
    inside[i[pair_distances(points, i, centres, j) <= radii[j]]] = True
    return inside


def shares(real: Any, fake: Any, k: int, precision: bool, recall: bool) -> tuple[float, float]:
    """Returns precision and recall, meeting each pair of images once for both; what is not asked for is 0."""
    real, fake = finite_pair(real, fake, "precision and recall")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            "precision and recall need 1 ≤ k and more than k images in each set, "
            f"got {k=}, real={len(real)}, fake={len(fake)}"
        )
    origin = mean_row(real)
    real_radii = squared_radii(real, origin, k) if precision else None
    fake_radii = squared_radii(fake, mean_row(fake), k) if recall else None
    inside_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    inside_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i, u in centred_tiles(fake, origin):
        for j, v in centred_tiles(real, origin):
            distances, rounding = squared_distances(u, v)
            if real_radii is not None:
                inside_real[i] |= covered(fake[i], real[j], real_radii[j], distances, rounding)
            if fake_radii is not None:
                inside_fake[j] |= covered(real[j], fake[i], fake_radii[i], distances.T, rounding.T)
    return inside_real.double().mean().item(), inside_fake.double().mean().item()


def precision(real: Any, fake: Any, k: int = NEIGHBOURS) -> float:
    """Returns the share of fake rows inside a ball of a real row; arguments as in `precision_recall`."""
    return shares(real, fake, k, precision=True, recall=False)[0]


def recall(real: Any, fake: Any, k: int = NEIGHBOURS) -> float:
    """Returns the share of real rows inside a ball of a fake row; arguments as in `precision_recall`."""
    return shares(real, fake, k, precision=False, recall=True)[1]


def precision_recall(real: Any, fake: Any, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Returns precision and recall: how much of each set lies on the manifold of the other.

    A ball reaches to its centre's k-th nearest neighbour in its own set, border included. Counts are those of
    float64 distances by direct differences: float64 products decide all pairs but those within rounding of a
    radius. Memory beyond the features is a few tiles.

    Args:
        real: Reference features (n, d), array or tensor of any float type.
        fake: Features (m, d) of the samples.
        k: Which neighbour sets the radius.

    Raises:
        ValueError: If a set has no k-th neighbour, shapes do not agree or an entry is not a finite float.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models".
    """
    return shares(real, fake, k, precision=True, recall=True)


def realism(points: Tensor, centres: Tensor, radii: Tensor, origin: Tensor) -> Tensor:
    """Returns (n,) float64, the largest ratio of a centre's radius to its distance: 1 or more is in a ball.

    Differs from the source, which leaves out the larger half of the balls: with all of them the share of
    points at 1 or more is the precision (or, with the sets exchanged, the recall).

    Args:
        points: Features (n, d).
        centres: Features (m, d).
        radii: (m,) what `squared_radii` returns of the centres.
        origin: (d,) float64, what both are centred on.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models",
    eq. 3.
    """
    largest = torch.zeros(len(points), dtype=torch.float64, device=points.device)
    for rows, u in centred_tiles(points, origin):
        for columns, v in centred_tiles(centres, origin):
            distances, rounding = squared_distances(u, v)
            ratios = (radii[columns] + rounding + TINY) / (distances + TINY)
            largest[rows] = torch.maximum(largest[rows], ratios.amax(dim=1))
    return largest.sqrt()
