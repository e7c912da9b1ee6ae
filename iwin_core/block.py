"""The Iwin block in the paper's three structures: window attention, depthwise convolution, MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iwin_core.attention import DepthwiseConv, IwinAttention

STRUCTURES = ("S1", "S2", "S3")
BLOCK_ATTENTIONS = ("interleaved", "window", "none")


class Mlp(nn.Module):
    """(…, C) → the same: Linear, erf-GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Returns fc2(GELU(fc1(x)))."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """(B, …) → the same: in training a share of samples is zeroed, the others scaled to keep the mean."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, in training with whole samples zeroed."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < keep
        return x * mask / keep


class IwinBlock(nn.Module):
    """(B, H, W, C) → the same: attention and convolution on one normed map, then an MLP, both residual.

    S1 (the paper's choice): y = x + IWA(LN(x)) + DWConv(LN(x)). S2: each part has its own connection to the
    input, y = x + IWA(LN(x)) + DWConv(x). S3: in series with one more norm, z = x + DWConv(LN0(x)),
    y = z + IWA(LN(z)). All end with y + MLP(LN(y)).

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        window: Window side M.
        kernel: Side of the depthwise kernel; 0 leaves the convolution out.
        mlp_ratio: Hidden width of the MLP over C.
        attention: `interleaved`, `window` (contiguous) or `none`.
        structure: `S1`, `S2` or `S3`.
        relative_position: Whether attention has a learned relative position bias.
        qkv_bias: Whether the q, k, v projection has a bias.
        drop_rate: Dropout in the MLP.
        drop_path_rate: Share of samples whose branches are dropped in training.
        padding: What attention does past the map's far ends, `mask` or `zeros`: see `IwinAttention`.

    Source: Iwin paper, eq. (7), Fig. 3 and Table VII. S2 and S3 are not in the released code; they are
    defined here from the figure's caption.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        kernel: int = 3,
        mlp_ratio: float = 4.0,
        *,
        attention: str = "interleaved",
        structure: str = "S1",
        relative_position: bool = False,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        padding: str = "mask",
    ):
        super().__init__()
        if attention not in BLOCK_ATTENTIONS or structure not in STRUCTURES:
            raise ValueError(
                f"attention must be one of {', '.join(BLOCK_ATTENTIONS)}, structure one of "
                f"{', '.join(STRUCTURES)}, got {attention=}, {structure=}"
            )
        self.structure = structure
        self.norm1 = nn.LayerNorm(dim)
        self.attn = None
        if attention != "none":
            self.attn = IwinAttention(
                dim,
                num_heads,
                window,
                kernel=None,
                interleaved=attention == "interleaved",
                qkv_bias=qkv_bias,
                relative_position=relative_position,
                padding=padding,
            )
        self.dwconv = DepthwiseConv(dim, (kernel, kernel)) if kernel else None
        self.norm0 = nn.LayerNorm(dim) if structure == "S3" and self.dwconv is not None else None
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, H, W, C)."""
        y = self.mix(x)
        return y + self.drop_path(self.mlp(self.norm2(y)))

    def mix(self, x: Tensor) -> Tensor:
        """Returns x after attention and convolution, by the block's structure."""
        if self.norm0 is not None and self.dwconv is not None:
            x = x + self.drop_path(self.dwconv(self.norm0(x)))
        normed = self.norm1(x)
        mixed = None if self.attn is None else self.attn(normed)
        if self.dwconv is not None and self.structure != "S3":
            mixed = self.dwconv(normed if self.structure == "S1" else x, mixed)
        return x if mixed is None else x + self.drop_path(mixed)
