"""How much of each set lies on the manifold of the other: precision and recall, in tiles, counted exactly."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flashdit.evaluation.metrics.arrays import finite_pair
from flashdit.evaluation.metrics.distances import (
    TILE,
    Cloud,
    lower_bounds,
    mean_row,
    pair_distances,
)

NEIGHBOURS = 3  # k of precision and recall
SPARE = 13  # neighbours kept beyond the k-th: rounding seldom brings more of them before it
CROWD = 64  # a tile with more undecided pairs than one in so many is decided by a float64 product instead


class Nearest:
    """The nearest others of rows by lower bound: bounds and places (n, width), taken in tile by tile."""

    def __init__(self, count: int, width: int, dtype: torch.dtype, device: torch.device):
        self.bounds = torch.full((count, width), math.inf, dtype=dtype, device=device)
        self.places = torch.zeros((count, width), dtype=torch.int64, device=device)

    def add(self, rows: slice, bounds: Tensor, first: int) -> None:
        """Takes in the bounds (rows, columns) to others from the place `first` on."""
        width = self.bounds.shape[1]
        near = bounds.contiguous().topk(min(width, bounds.shape[1]), largest=False)
        both = torch.cat([self.bounds[rows], near.values], dim=1)
        places = torch.cat([self.places[rows], near.indices + first], dim=1)
        best = both.topk(width, largest=False)
        self.bounds[rows], self.places[rows] = best.values, places.gather(1, best.indices)

    def radii(self, features: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns squared distances of features[rows] to the k-th nearest, and which are certain."""
        distances = torch.full_like(self.bounds, math.inf, dtype=torch.float64)
        wanted = torch.zeros_like(self.bounds, dtype=torch.bool)
        wanted[:, :k] = True
        for _ in range(2):  # the first k give a radius; whatever might lie within it is measured next
            i, column = wanted.nonzero(as_tuple=True)
            distances[i, column] = pair_distances(features, rows[i], features, self.places[i, column])
            radii = distances.sort(dim=1).values[:, k - 1]
            wanted = (self.bounds <= radii[:, None]) & distances.isinf()
        everyone = self.bounds.shape[1] == len(features) - 1
        return radii, (self.bounds[:, -1] > radii) | (radii == 0) | everyone


def squared_radii(features: Tensor, origin: Tensor, k: int) -> Tensor:
    """Returns (n,) float64 squared distances to the k-th nearest other row of the same set (n, d).

    Args:
        features: Float rows, more than k of them.
        origin: (d,) float64 near the rows; it changes the time this takes and no radius.
        k: Which neighbour.
    """
    return cloud_radii(Cloud(features, origin), k)


def cloud_radii(cloud: Cloud, k: int) -> Tensor:
    """Returns (n,) float64 squared distances to the k-th nearest other row of the cloud."""
    features = cloud.features
    width = min(k + SPARE, len(features) - 1)
    everyone = torch.arange(len(features), device=features.device)
    nearest = Nearest(len(features), width, cloud.bound_type, features.device)
    for rows in cloud.tiles():
        for columns in cloud.tiles(rows.start):  # each pair is met once
            bounds, _ = lower_bounds(cloud, rows, cloud, columns, exact=False)
            if columns == rows:
                bounds.fill_diagonal_(math.inf)  # a row is not its own neighbour
            else:
                nearest.add(columns, bounds.T, rows.start)
            nearest.add(rows, bounds, columns.start)
    radii, certain = nearest.radii(features, everyone, k)
    for rows in everyone[~certain].split(TILE):
        again = Nearest(len(rows), width, torch.float64, features.device)
        for columns in cloud.tiles():
            bounds, _ = lower_bounds(cloud, rows, cloud, columns, exact=True)
            bounds[rows[:, None] == everyone[columns]] = math.inf
            again.add(slice(None), bounds, columns.start)
        radii[rows], _ = again.radii(features, rows, k)
    return radii


def mark_covered(
    points: Cloud, rows: Tensor, centres: Cloud, columns: slice, bounds: Tensor, slack: float
) -> None:
    """Marks the points (rows) that lie in a ball of the centres (columns), given their `lower_bounds`."""
    if centres.radii is None:
        return
    gaps = bounds - centres.radii[columns].to(bounds.dtype)
    near = (gaps.amin(dim=1) <= 0) & ~points.covered[rows]
    rows, gaps = rows[near], gaps[near]
    # An upper bound is a lower one and twice its slack; what that puts inside needs no second look.
    margins = (2 * slack * centres.norms[columns]).to(bounds.dtype)
    inside = ((gaps + margins) <= -2 * slack * points.norms[rows].to(bounds.dtype)[:, None]).any(dim=1)
    points.covered[rows[inside]] = True
    rows, gaps = rows[~inside], gaps[~inside]
    if bounds.dtype != torch.float64 and (gaps <= 0).sum() * CROWD > bounds.numel():
        again = lower_bounds(points, rows, centres, columns, exact=True)
        mark_covered(points, rows, centres, columns, *again)
    elif len(rows):
        confirm_covered(points, rows, centres, columns, gaps)


def confirm_covered(points: Cloud, rows: Tensor, centres: Cloud, columns: slice, gaps: Tensor) -> None:
    """Marks the points that direct differences put in a ball: first by each one's likeliest, then by any."""
    assert centres.radii is not None
    for likeliest in (True, False):
        open_rows = ~points.covered[rows]
        rows, gaps = rows[open_rows], gaps[open_rows]
        i, j = (gaps <= gaps.amin(dim=1, keepdim=True) if likeliest else gaps <= 0).nonzero(as_tuple=True)
        j = j + columns.start
        distances = pair_distances(points.features, rows[i], centres.features, j)
        points.covered[rows[i[distances <= centres.radii[j]]]] = True


def shares(real: Any, fake: Any, k: int, precision: bool, recall: bool) -> tuple[float, float]:
    """Returns precision and recall, meeting each pair of images once for both; what is not asked for is 0."""
    real, fake = finite_pair(real, fake, "precision and recall")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            "precision and recall need 1 ≤ k and more than k images in each set, "
            f"got {k=}, real={len(real)}, fake={len(fake)}"
        )
    origin = mean_row(real)
    fake_radii = squared_radii(fake, mean_row(fake), k) if recall else None  # before any other copy is made
    reals = Cloud(real, origin)
    reals.radii = cloud_radii(reals, k) if precision else None
    fakes = Cloud(fake, origin)
    fakes.radii = fake_radii
    fake_rows = torch.arange(len(fake), device=fake.device)
    real_rows = torch.arange(len(real), device=real.device)
    for rows in fakes.tiles():
        for columns in reals.tiles():
            bounds, slack = lower_bounds(fakes, rows, reals, columns, exact=False)
            mark_covered(fakes, fake_rows[rows], reals, columns, bounds, slack)
            mark_covered(reals, real_rows[columns], fakes, rows, bounds.T, slack)
    return fakes.covered.double().mean().item(), reals.covered.double().mean().item()


def precision(real: Any, fake: Any, k: int = NEIGHBOURS) -> float:
    """Returns the share of fake rows inside a ball of a real row; arguments as in `precision_recall`."""
    return shares(real, fake, k, precision=True, recall=False)[0]


def recall(real: Any, fake: Any, k: int = NEIGHBOURS) -> float:
    """Returns the share of real rows inside a ball of a fake row; arguments as in `precision_recall`."""
    return shares(real, fake, k, precision=False, recall=True)[1]


def precision_recall(real: Any, fake: Any, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Returns precision and recall: how much of each set lies on the manifold of the other.

    A ball reaches to its centre's k-th nearest neighbour in its own set, border included. Counts are those of
    float64 distances by direct differences: products in a cheaper type, with a bound on their rounding, leave
    few pairs open. Memory is the features, a copy in that type and a few tiles.

    Args:
        real: Reference features (n, d), array or tensor of any float type.
        fake: Features (m, d) of the samples.
        k: Which neighbour sets the radius.

    Raises:
        ValueError: If a set has no k-th neighbour, shapes do not agree or an entry is not a finite float.

    Source: Kynkäänniemi et al., "Improved precision and recall metric for assessing generative models".
    """
    return shares(real, fake, k, precision=True, recall=True)
