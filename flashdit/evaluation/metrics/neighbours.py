"""Which rows are nearest, and how far outside the other set's manifold a row lies: features, tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor

from flashdit.evaluation.features.moments import Moments
from flashdit.evaluation.metrics.distances import CENTRE_ROWS, POINT_ROWS, squared_distances
from flashdit.evaluation.metrics.metrics import frechet_distance

TINY = torch.finfo(torch.float64).tiny  # makes 0 / 0 one: a row on the centre of a ball of radius 0 is inside


def nearest(points: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k nearest others of every point, nearest first.

    Args:
        points: Features (n, d).
        others: Features (m, d).
        k: How many; all of them where there are fewer.

    Returns:
        Distances (n, k) float64, which are exact (0 for a duplicate), and rows of `others` (n, k) int64.
    """
    origin = others.mean(dim=0, dtype=torch.float64)
    found = [
        _nearest_of_block(block, others, origin, min(k, len(others))) for block in points.split(POINT_ROWS)
    ]
    distances, rows = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(rows)


def _nearest_of_block(block: Tensor, others: Tensor, origin: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns distances and rows for a block of points, keeping the k best of each tile."""
    centred = block.double() - origin
    squares, rows = centred.new_empty(len(block), 0), block.new_empty(len(block), 0, dtype=torch.int64)
    for start in range(0, len(others), CENTRE_ROWS):
        tile, _ = squared_distances(centred, others[start : start + CENTRE_ROWS].double() - origin)
        tile_rows = torch.arange(start, start + tile.shape[1], device=rows.device).expand(len(block), -1)
        squares, rows = torch.cat([squares, tile], dim=1), torch.cat([rows, tile_rows], dim=1)
        best = squares.topk(min(k, squares.shape[1]), largest=False).indices
        squares, rows = squares.gather(1, best), rows.gather(1, best)
    # The products above cancel only to rounding; k differences per point cost little and are exact.
    exact = torch.stack([(block.double() - others[column].double()).norm(dim=1) for column in rows.T], dim=1)
    order = exact.argsort(dim=1, stable=True)
    return exact.gather(1, order), rows.gather(1, order)


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
    ratios = []
    for block in points.split(POINT_ROWS):
        block = block.double() - origin
        largest = block.new_zeros(len(block))
        for others, squares in zip(centres.split(CENTRE_ROWS), radii.split(CENTRE_ROWS), strict=True):
            distances, rounding = squared_distances(block, others.double() - origin)
            ratio = (squares + rounding + TINY) / (distances + TINY)
            largest = torch.maximum(largest, ratio.amax(dim=1))
        ratios.append(largest.sqrt())
    return torch.cat(ratios)


def distance_of_rows(u: Tensor, v: Tensor) -> float:
    """Returns the Fréchet distance of the Gaussians of two sets of rows (n, d) and (m, d), n and m above 1.

    With Σ1 = XᵀX and Σ2 = YᵀY the term tr (Σ1 Σ2)^½ is the nuclear norm of X Yᵀ, an (n, m) matrix: a class of
    fifty images in 2048 dimensions takes milliseconds, and its rank needs no care.
    """
    if min(len(u), len(v)) > u.shape[1]:
        first, second = (Moments(u.shape[1], u.device) for _ in range(2))
        first.add(u)
        second.add(v)
        return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    u, v = u.double(), v.double()
    mean_u, mean_v = u.mean(0), v.mean(0)
    x, y = (u - mean_u) / (len(u) - 1) ** 0.5, (v - mean_v) / (len(v) - 1) ** 0.5
    trace_of_root = torch.linalg.svdvals(x @ y.T).sum()
    return ((mean_u - mean_v).square().sum() + x.square().sum() + y.square().sum() - 2 * trace_of_root).item()
