"""What a backbone is built from: patches made tokens, and a stage of blocks at one resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ImagePatchEmbed(nn.Module):
    """(B, C, H, W) → (B, ⌈H/p⌉, ⌈W/p⌉, dim): zeros at the far ends, convolution with stride p, LN."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the tokens in a channels-last grid."""
        p = self.patch_size
        rows, columns = (p - x.shape[2] % p) % p, (p - x.shape[3] % p) % p
        if rows or columns:
            x = F.pad(x, (0, columns, 0, rows))
        return self.norm(self.proj(x).movedim(1, -1))


class Stage(nn.Module):
    """Blocks at one resolution, and the downsample after them, None in the last stage."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns the map (B, H, W, C) after the blocks, before the downsample."""
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
