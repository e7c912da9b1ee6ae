"""What mean and spread rows have that are read in parts: float64 sums, without keeping the rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ROWS = 1024  # one matrix product per block: many small ones are four times slower at 2048 dimensions
BLOCK_LATENTS = 512  # latents that are float64 at a time
Sums = tuple[int, Tensor, Tensor]
"""Count, mean (d,) and scatter of rows: sums of products (d, d), or of squares (d,), of their deviations."""


def join(first: Sums, second: Sums) -> Sums:
    """Returns the sums of both sets of rows, in tensors of their own; one of them at least has rows.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    (m, mean_m, scatter_m), (n, mean_n, scatter_n) = first, second
    total = m + n
    shift = mean_n - mean_m
    between = shift.square() if scatter_m.ndim == 1 else torch.outer(shift, shift)
    scatter = between.mul_(m * n / total).add_(scatter_n).add_(scatter_m)
    return total, mean_m + shift * (n / total), scatter


class Moments:
    """Count, mean and covariance of rows; two of them merge into the moments of both sets.

    Each block is centred on its own mean before its products are taken, so that a mean far from zero costs no
    digits, and blocks are joined by the pairwise update.

    Args:
        dimensions: Columns of every row.
        device: Where the sums live.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu"):
        mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self._sums: Sums = (0, mean, mean.new_zeros(dimensions, dimensions))
        self._pending: list[Tensor] = []
        self._pending_rows = 0

    def add(self, rows: Tensor) -> None:
        """Adds rows (n, dimensions) of any float type."""
        self._pending.append(rows.detach().to(self._sums[1]))
        self._pending_rows += len(rows)
        if self._pending_rows >= BLOCK_ROWS:
            self._flush()

    def merge(self, other: Moments) -> None:
        """Adds all rows that `other` has seen; `other` stays as it is."""
        count, mean, scatter = other._flush()
        if count:
            self._sums = join(self._sums, (count, mean.to(self._sums[1]), scatter.to(self._sums[2])))

    def to(self, device: torch.device | str) -> Moments:
        """Moves the sums to a device and returns the moments."""
        count, mean, scatter = self._flush()
        self._sums = count, mean.to(device), scatter.to(device)
        return self

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._sums[0] + self._pending_rows

    @property
    def mean(self) -> Tensor:
        """The mean (dimensions,), float64."""
        return self._flush()[1].clone()

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance (dimensions, dimensions), float64.

        Raises:
            ValueError: If fewer than two rows have been added.
        """
        count, _, scatter = self._flush()
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {count}")
        return scatter / (count - 1)

    def _flush(self) -> Sums:
        """Returns the sums with the pending rows in them."""
        if self._pending_rows:
            block = torch.cat(self._pending)
            self._pending, self._pending_rows = [], 0
            mean = block.mean(0)
            block -= mean
            rows = block.numpy() if block.device.type == "cpu" else block  # NumPy's xᵀx does half the work
            self._sums = join(self._sums, (len(block), mean, torch.as_tensor(rows.T @ rows)))
        return self._sums


@dataclass
class ChannelMoments:
    """Count, mean and sum of squared deviations of each latent channel, float64, as JSON holds them.

    Two of them join by the pairwise update, so that each shard is read once and alone.
    """

    count: int
    mean: list[float]
    scatter: list[float]

    @classmethod
    def of(cls, latents: Tensor) -> ChannelMoments:
        """Returns the moments of latents (N, C, H, W), any float type."""
        channels, count = latents.shape[1], latents.numel() // latents.shape[1]
        if not count:
            return cls(0, [0.0] * channels, [0.0] * channels)
        blocks = latents.split(BLOCK_LATENTS)
        mean = torch.stack([block.double().sum((0, 2, 3)) for block in blocks]).sum(0) / count
        centre = mean.reshape(-1, 1, 1)
        scatter = torch.stack([(block.double() - centre).square().sum((0, 2, 3)) for block in blocks]).sum(0)
        return cls(count, mean.tolist(), scatter.tolist())

    @classmethod
    def joined(cls, parts: Iterable[ChannelMoments]) -> ChannelMoments:
        """Returns the moments of all parts together, joined in their order; at least one has values."""
        first, *others = [part._sums() for part in parts if part.count]
        for other in others:
            first = join(first, other)
        count, mean, scatter = first
        return cls(count, mean.tolist(), scatter.tolist())

    def std(self) -> list[float]:
        """Returns the unbiased standard deviation of each channel.

        Raises:
            ValueError: If a channel is constant, which no standard deviation can normalise.
        """
        _, _, scatter = self._sums()
        std = (scatter / max(self.count - 1, 1)).sqrt().tolist()
        if not all(value > 0 for value in std):  # NaN is not
            raise ValueError(f"every latent channel must vary over the data, got {std=}")
        return std

    def _sums(self) -> Sums:
        """Returns count, mean and scatter as `join` takes them."""
        mean, scatter = torch.tensor([self.mean, self.scatter], dtype=torch.float64)
        return self.count, mean, scatter
