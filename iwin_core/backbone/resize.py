"""How weights follow a new input size: tables are resized, convolutions that become needed start as 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from iwin_core.attention import DepthwiseConv
from iwin_core.block import IwinBlock


def resize_bicubic(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Returns a table (1, h, w, C) at another grid."""
    size = [int(side) for side in grid]
    resized = F.interpolate(table.movedim(-1, 1), size=size, mode="bicubic", align_corners=False)
    return resized.movedim(1, -1)


def resize_block(block: IwinBlock, window: int, kernel: int) -> None:
    """Gives a block another window, and where it now needs a convolution, one of zeros: the identity."""
    if block.attn is not None and block.attn.window != (window, window):
        table = block.attn.relative_position_bias_table
        if table is not None:
            sides = [2 * m - 1 for m in block.attn.window]
            resized = resize_bicubic(table.detach().unflatten(0, sides)[None], (2 * window - 1,) * 2)
            block.attn.relative_position_bias_table = nn.Parameter(
                resized[0].flatten(0, 1), table.requires_grad
            )
        block.attn.window = (window, window)
    if kernel and block.dwconv is None:
        weight = block.norm1.weight
        block.dwconv = DepthwiseConv(len(weight), (kernel, kernel)).to(weight)
        for parameter in block.dwconv.parameters():
            nn.init.zeros_(parameter)
        new: list[nn.Module] = [block.dwconv]
        if block.structure == "S3":
            block.norm0 = nn.LayerNorm(len(weight)).to(weight)
            new.append(block.norm0)
        for module in new:  # as the block is: in training or not, frozen or not
            module.train(block.training).requires_grad_(weight.requires_grad)
