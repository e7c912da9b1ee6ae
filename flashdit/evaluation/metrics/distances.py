"""Squared distances of pairs of rows: bounds for all by a cheap product in tiles, exact ones for a few."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TILE = 1024  # rows and columns of a tile of bounds: 4 MiB
POINT_ROWS, CENTRE_ROWS = 2048, 8192  # a tile for who needs every distance: 128 MiB
CHUNK = 128  # rows, or pairs of them, in float64 at a time: few, as the allocator keeps what was freed


def fast_type(device: torch.device) -> torch.dtype:
    """Returns the type of the first look at all pairs: bfloat16 where the device multiplies it natively."""
    if device.type == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    return torch.bfloat16


@contextmanager
def sums_in_float32() -> Iterator[None]:
    """Keeps CUDA from adding partial sums of bfloat16 products in bfloat16."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed


def mean_row(features: Tensor) -> Tensor:
    """Returns the mean (d,) of rows (n, d) in float64, without a float64 copy of them all."""
    sums = [rows.double().sum(dim=0) for rows in features.split(CHUNK)]
    return torch.stack(sums).sum(dim=0) / len(features)


class Cloud:
    """The rows of a set relative to an origin: norms in float64, and a copy in the type of the first look.

    Attributes:
        features: (n, d) as given.
        norms: (n,) float64 squared distances to the origin.
        bound_type: What bounds of the first look come in.
        radii: (n,) float64 squared radii of the rows' balls; None where nobody asks for them.
        covered: (n,) whether a row is known to lie inside a ball of the other set.
    """

    def __init__(self, features: Tensor, origin: Tensor):
        self.features, self.origin = features, origin
        self.radii: Tensor | None = None
        self.norms = torch.empty(len(features), dtype=torch.float64, device=features.device)
        self.covered = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        self._copy = torch.empty(features.shape, dtype=fast_type(features.device), device=features.device)
        parts = [part.split(CHUNK) for part in (features, self.norms, self._copy)]
        for rows, norms, copy in zip(*parts, strict=True):
            centred = rows - origin
            torch.linalg.vecdot(centred, centred, out=norms)
            copy.copy_(centred)
        if not 1e-20 < self.norms.amax() < 1e30:  # float32 sums would overflow, or lose what underflows
            self._copy = self.features - origin
        self.bound_type = torch.promote_types(self._copy.dtype, torch.float32)

    def tiles(self, start: int = 0) -> Iterator[slice]:
        """Yields the rows from `start` on, tile by tile."""
        for first in range(start, len(self.features), TILE):
            yield slice(first, min(first + TILE, len(self.features)))

    def read(self, rows: slice | Tensor, exact: bool) -> Tensor:
        """Returns the rows relative to the origin, in float64 or in the type of the first look."""
        return self.features[rows] - self.origin if exact else self._copy[rows]  # the origin is float64


def rounding(dtype: torch.dtype, dimensions: int) -> float:
    """Returns the largest error of a squared distance by way of a product, over |u|² + |v|².

    Rounding u and v costs eps / 2 of each, rounding the product another; each of the sum's terms adds
    the unit of what sums are kept in. 2 |u| |v| ≤ |u|² + |v|² makes all of them shares of the norms.
    """
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return 1.6 * torch.finfo(dtype).eps + (dimensions + 32) * torch.finfo(sums).eps


def squared_distances(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns |u − v|² of every pair, (rows of u, rows of v), and the rounding each may carry."""
    norms = u.square().sum(1)[:, None] + v.square().sum(1)[None]
    distances = torch.addmm(norms, u, v.T, alpha=-2).clamp_(min=0)
    return distances, norms.mul_(rounding(u.dtype, u.shape[1]))


def lower_bounds(
    u: Cloud, rows: slice | Tensor, v: Cloud, columns: slice, exact: bool
) -> tuple[Tensor, float]:
    """Returns (rows, columns) numbers that no squared distance is below, and their relative `rounding`."""
    exact = exact or u.bound_type != v.bound_type
    left, right = u.read(rows, exact), v.read(columns, exact)
    slack = rounding(left.dtype, left.shape[1])
    kind = torch.promote_types(left.dtype, torch.float32)
    lefts, rights = ((1 - slack) * norms for norms in (u.norms[rows], v.norms[columns]))
    bounds = lefts.to(kind)[:, None] + rights.to(kind)
    with sums_in_float32():
        return bounds.sub_((left @ right.T).to(kind), alpha=2), slack


def pair_distances(u: Tensor, i: Tensor, v: Tensor, j: Tensor) -> Tensor:
    """Returns the float64 squared distance of each pair of rows u[i], v[j], by direct differences."""
    # cdist without a product subtracts as it sums: no cancellation, and a tie is one to the last bit.
    mode = "donot_use_mm_for_euclid_dist"
    distances = torch.empty(len(i), dtype=torch.float64, device=u.device)
    for first in range(0, len(i), CHUNK):
        some = slice(first, first + CHUNK)
        left, right = u[i[some]].double()[:, None], v[j[some]].double()[:, None]
        distances[some] = torch.cdist(left, right, compute_mode=mode)[:, 0, 0]
    return distances.square_()
