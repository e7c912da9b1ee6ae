"""The Iwin block (paper Fig. 3, structure S1): attention and convolution on one normed map, then an MLP."""

from __future__ import annotations

from torch import Tensor, nn

from iwin_core.attention import IwinAttention
from iwin_core.windows import Window


class Mlp(nn.Module):
    """(…, C) → the same: Linear, erf-GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns fc2(GELU(fc1(x)))."""
        return self.fc2(self.act(self.fc1(x)))


class IwinBlock(nn.Module):
    """(B, H, W, C) → the same: y = x + IWA(LN(x)) + DWConv(LN(x)), then y + MLP(LN(y)).

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        window: Window side M, or one per axis.
        kernel: Side of the depthwise kernel; 0 or None leaves the convolution out.
        mlp_ratio: Hidden width of the MLP over C.

    Source: Iwin paper, eq. (7) and Fig. 3 (a).
    """

    def __init__(
        self, dim: int, num_heads: int, window: Window, kernel: Window | None = 3, mlp_ratio: float = 4.0
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = IwinAttention(dim, num_heads, window, kernel)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output (B, H, W, C)."""
        y = x + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))
