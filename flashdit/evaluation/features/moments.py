"""Mean and covariance of rows that arrive in batches, in float64 and without keeping them."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS = 1024  # one matrix product per block: many small ones are four times slower at 2048 dimensions


class Moments:
    """Counts, means and scatter of rows; two of them merge into the moments of both sets.

    Each block is centred on its own mean before its products are taken, so that a mean far from zero costs no
    digits, and blocks are joined by the pairwise update.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances".

    Args:
        dimensions: Columns of every row.
        device: Where the sums live.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu"):
        self._joined_rows = 0
        self._mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)
        self._pending: list[Tensor] = []
        self._pending_rows = 0

    def add(self, rows: Tensor) -> None:
        """Adds rows (n, dimensions) of any float type."""
        self._pending.append(rows.detach().to(self._mean))
        self._pending_rows += len(rows)
        if self._pending_rows >= BLOCK_ROWS:
            self._flush()

    def merge(self, other: Moments) -> None:
        """Adds all rows that `other` has seen; `other` stays as it is."""
        self._flush()
        other._flush()
        self._join(other._joined_rows, other._mean.to(self._mean), other._scatter.to(self._scatter))

    def to(self, device: torch.device | str) -> Moments:
        """Moves the sums to a device and returns the moments."""
        self._flush()
        self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)
        return self

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._joined_rows + self._pending_rows

    @property
    def mean(self) -> Tensor:
        """The mean (dimensions,), float64."""
        self._flush()
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (dimensions, dimensions), float64.

        Raises:
            ValueError: If fewer than two rows have been added.
        """
        self._flush()
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self._scatter / (self.count - 1)

    def _flush(self) -> None:
        """Takes the pending rows into the sums."""
        if not self._pending_rows:
            return
        block = torch.cat(self._pending)
        mean = block.mean(0)
        centred = block - mean
        self._pending, self._pending_rows = [], 0
        rows = centred.numpy() if centred.device.type == "cpu" else centred  # NumPy's xᵀx does half the work
        self._join(len(block), mean, torch.as_tensor(rows.T @ rows))

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Joins the moments of another set of rows to these."""
        if not count:
            return
        total = self._joined_rows + count
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += torch.outer(shift, shift) * (self._joined_rows * count / total)
        self._mean += shift * (count / total)
        self._joined_rows = total
