"""Which rows of features are near: float64 squared distances by tiles, and exact ones of chosen pairs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1024  # rows that are float64 at a time, and columns: the distances of a pair of tiles take 8 MiB
PAIRS = 256  # pairs of rows that are float64 at a time


def mean_row(features: Tensor) -> Tensor:
    """Returns the mean (d,) of rows (n, d) in float64, without a float64 copy of them all."""
    return torch.stack([rows.double().sum(dim=0) for rows in features.split(TILE)]).sum(dim=0) / len(features)


def centred_tiles(features: Tensor, origin: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Yields which rows a tile holds and these rows minus the float64 origin (d,), from row `start` on."""
    for first in range(start, len(features), TILE):
        rows = slice(first, min(first + TILE, len(features)))
        yield rows, features[rows] - origin


def squared_distances(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns |u − v|² of float64 rows (n, d) and (m, d) by a product, and the rounding of each.

    Sums of d products err by at most d/2 ε of the sum of their magnitudes. With 2 |uᵀv| ≤ |u|² + |v|² that is
    d ε (|u|² + |v|²) for the three together; the direct difference that decides a pair may err by as much.

    Returns:
        Squared distances (n, m) and the largest error of each (n, m).
    """
    norms = torch.linalg.vecdot(u, u)[:, None] + torch.linalg.vecdot(v, v)
    distances = torch.addmm(norms, u, v.T, alpha=-2).clamp_(min=0)
    return distances, norms.mul_(2 * (u.shape[1] + 16) * torch.finfo(torch.float64).eps)


def pair_distances(u: Tensor, i: Tensor, v: Tensor, j: Tensor) -> Tensor:
    """Returns the float64 squared distance of each pair of rows u[i], v[j], by direct differences."""
    # cdist without a product subtracts as it sums: no cancellation, and a tie is one to the last bit.
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.empty(len(i), dtype=torch.float64, device=u.device)
    for some in torch.arange(len(i), device=u.device).split(PAIRS):
        left, right = u[i[some]].double()[:, None], v[j[some]].double()[:, None]
        distances[some] = torch.cdist(left, right, compute_mode=mode)[:, 0, 0]
    return distances.square_()


def keep_smallest(values: Tensor, columns: Tensor, tile: Tensor, first: int) -> None:
    """Takes a tile of distances (n, m) into the smallest (n, k) of each row and their columns, in place.

    Args:
        values: (n, k) smallest so far, ascending; infinite where fewer have been seen.
        columns: (n, k) int64 columns of these.
        tile: (n, m) distances to the columns from `first` on.
        first: Column of the tile's first distance.
    """
    fresh = torch.arange(first, first + tile.shape[1], device=tile.device).expand_as(tile)
    values_of_all, columns_of_all = torch.cat([values, tile], dim=1), torch.cat([columns, fresh], dim=1)
    best = values_of_all.topk(values.shape[1], largest=False)
    values.copy_(best.values)
    columns.copy_(columns_of_all.gather(1, best.indices))


def nearest_rows(points: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k nearest others of every point, nearest first.

    Args:
        points: Features (n, d).
        others: Features (m, d).
        k: Number of neighbours; all of the others where there are fewer.

    Returns:
        Distances (n, k) float64, which are exact (0 for a duplicate), and rows of `others` (n, k) int64.
    """
    origin = mean_row(others)
    width = min(k, len(others))
    distances = torch.full((len(points), width), torch.inf, dtype=torch.float64, device=points.device)
    found = torch.zeros_like(distances, dtype=torch.int64)
    for rows, u in centred_tiles(points, origin):
        for columns, v in centred_tiles(others, origin):
            keep_smallest(distances[rows], found[rows], squared_distances(u, v)[0], columns.start)
    # Products cancel only to rounding; k differences per point cost little and are exact.
    row = torch.arange(len(points), device=points.device)
    exact = torch.stack([pair_distances(points, row, others, column) for column in found.T], dim=1).sqrt_()
    order = exact.argsort(dim=1, stable=True)
    return exact.gather(1, order), found.gather(1, order)
