"""Attention kinds by name: interleaved windows, plain windows, and LightningDiT's global attention."""

from __future__ import annotations

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from flashdit.models.embed import rope_tables, rotate
from flashdit.shared.registry import Registry
from iwin_core import IwinAttention
from iwin_core.kernels import attention

ATTENTIONS = Registry("attention")


@dataclass(kw_only=True)
class AttentionShape:
    """Sizes that an attention kind is built for, beside its own options."""

    dim: int
    num_heads: int
    grid: tuple[int, int]
    qk_norm: type[nn.Module] | None


@dataclass(kw_only=True)
class WindowOptions:
    """Options of both window kinds."""

    window: int = 4
    """Window side M in tokens."""
    kernel: int = 3
    """Side of the parallel depthwise kernel, odd; 0 leaves it out."""


@dataclass(kw_only=True)
class GlobalOptions:
    """Options of global attention."""

    rope: bool = True
    """Whether queries and keys are turned by a 2-D rotary embedding."""


@ATTENTIONS.register("iwin", WindowOptions)
def make_iwin(options: WindowOptions, shape: AttentionShape) -> IwinAttention:
    """Returns Iwin attention: interleaved windows beside a depthwise convolution."""
    return _make_windows(options, shape, interleaved=True)


@ATTENTIONS.register("window", WindowOptions)
def make_window(options: WindowOptions, shape: AttentionShape) -> IwinAttention:
    """Returns contiguous windows beside a depthwise convolution."""
    return _make_windows(options, shape, interleaved=False)


def _make_windows(options: WindowOptions, shape: AttentionShape, interleaved: bool) -> IwinAttention:
    """Returns the window attention after checking that its window fits the training grid."""
    window = options.window
    if not isinstance(window, int) or not 1 <= window <= max(shape.grid):
        raise ValueError(
            f"window must be between 1 and the side of the token grid, got {window=} for grid={shape.grid}"
        )
    return IwinAttention(
        shape.dim, shape.num_heads, window, options.kernel, interleaved=interleaved, qk_norm=shape.qk_norm
    )


@ATTENTIONS.register("global", GlobalOptions)
class GlobalAttention(nn.Module):
    """(b, h, w, c) → the same: every token attends to every token, as in DiT and LightningDiT.

    Args:
        options: Whether to use the rotary embedding.
        shape: Width, heads, the native grid and the norm of queries and keys.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, options: GlobalOptions, shape: AttentionShape):
        super().__init__()
        head_dim = shape.dim // shape.num_heads
        self.num_heads = shape.num_heads
        self.rope = options.rope
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim)
        self.q_norm = shape.qk_norm(head_dim) if shape.qk_norm else nn.Identity()
        self.k_norm = shape.qk_norm(head_dim) if shape.qk_norm else nn.Identity()
        self.proj = nn.Linear(shape.dim, shape.dim)
        self.grid = shape.grid
        if self.rope:
            cos, sin = rope_tables(self.grid, head_dim)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the attention of all tokens over all tokens."""
        grid = (x.shape[1], x.shape[2])
        q, k, v = rearrange(
            self.qkv(x), "b h w (three heads d) -> three b heads (h w) d", three=3, heads=self.num_heads
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            cos, sin = self._tables(grid, q)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attention(q, k, v)
        return self.proj(rearrange(out, "b heads (h w) d -> b h w (heads d)", h=grid[0]))

    def _tables(self, grid: tuple[int, int], q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rotary tables of this grid: the stored ones at the native size."""
        if grid == self.grid:
            return self.cos, self.sin
        cos, sin = rope_tables(grid, q.shape[-1])
        return cos.to(q.device), sin.to(q.device)
