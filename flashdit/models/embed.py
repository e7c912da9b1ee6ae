"""Embeddings: patches, time, labels, and the fixed position table (2-D sin-cos)."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from iwin_core.rotary import MAX_PERIOD

TIME_CHANNELS = 256


def timestep_embedding(t: Tensor, channels: int = TIME_CHANNELS) -> Tensor:
    """Returns [cos | sin] of t at `channels / 2` frequencies from 1 to 1 / 10,000.

    Args:
        t: Times (B,).
        channels: Width of the embedding, even.

    Returns:
        float32 (B, channels).
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device).float() / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Returns the fixed 2-D sin-cos position table.

    Args:
        grid: Rows and columns of tokens.
        dim: Channels, a multiple of 4.

    Returns:
        float32 (1, h·w, dim): the first half from the column, the second from the row, each [sin | cos].

    Source: DiT, as LightningDiT uses it: the column comes first.
    """
    if dim % 4:
        raise ValueError(f"hidden_size must be a multiple of 4 for sin-cos positions, got {dim}")
    frequencies = MAX_PERIOD ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = (torch.arange(side, dtype=torch.float64)[:, None] * frequencies for side in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], dim=-1) for angles in (rows, columns))
    table = torch.cat(
        [repeat(columns, "w d -> h w d", h=grid[0]), repeat(rows, "h d -> h w d", w=grid[1])], dim=-1
    )
    return rearrange(table, "h w d -> 1 (h w) d").float()


class PatchEmbed(nn.Module):
    """(B, C, H, W) → (B, h, w, dim): one Linear per p×p patch, written as a convolution."""

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens in a channels-last grid."""
        # Laid out by tokens: what is added to them later takes their layout.
        return rearrange(self.proj(x), "b c h w -> b h w c").contiguous()


class TimestepEmbedder(nn.Module):
    """(B,) → (B, dim): sinusoids of scale · t, Linear, SiLU, Linear.

    Args:
        dim: Width of the embedding.
        scale: Factor on t; 1 is LightningDiT's, 1000 spreads [0, 1] over DiT's range.
    """

    def __init__(self, dim: int, scale: float):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the embedding of each time; `dtype` is what the layers compute in."""
        # Not that of the weights, which layerwise casting stores in another one.
        return self.mlp(timestep_embedding(t * self.scale).to(dtype))


class StretchEmbedder(nn.Module):
    """Durations (B,) and guidance scales (B,) → (B, dim): the sum of what a TimestepEmbedder makes of each.

    Of a guidance scale w it is given 1 − 1/w, from 0 to 1. A new one gives zeros, so that a model that starts
    from one of velocities is that one.
    """

    def __init__(self, dim: int, scale: float):
        super().__init__()
        self.duration, self.guidance = TimestepEmbedder(dim, scale), TimestepEmbedder(dim, scale)

    def initialise(self) -> None:
        """Draws new weights as those of times, but zeros for the last layers."""
        for embedder in (self.duration, self.guidance):
            first, _, last = embedder.mlp
            nn.init.normal_(first.weight, std=0.02)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]

    def forward(self, duration: Tensor, guidance: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the embedding; `dtype` is what the layers compute in."""
        return self.duration(duration, dtype) + self.guidance(1 - 1 / guidance, dtype)


class LabelEmbedder(nn.Module):
    """(B,) int64 → (B, dim): one row per class, and the last for the null label `num_classes`."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Returns the embedding of each label, the null one where `drop` (B,) is true."""
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)
