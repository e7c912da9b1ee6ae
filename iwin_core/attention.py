"""Iwin attention: attention in interleaved windows beside a depthwise convolution, on grids of any rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from iwin_core.kernels import (
    attention,
    attention_obstacle,
    conv_obstacle,
    depthwise_conv,
    kernels_chosen,
    window_attention,
)
from iwin_core.rotary import Rotary, rotate
from iwin_core.windows import Window, merge, partition, per_axis

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PADDINGS = ("mask", "zeros")


class DepthwiseConv(nn.Module):
    """(B, *grid, C) → the same: a depthwise convolution with bias; zeros surround the true border of the map.

    That zero padding is where a FlashDiT without position embedding learns positions from, so the map comes
    here unpadded. There is no pointwise convolution, as in the authors' code.
    """

    def __init__(self, dim: int, kernel: Sequence[int]):
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.depthwise = CONVS[len(kernel)](dim, dim, tuple(kernel), padding=padding, groups=dim)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Returns the convolved map (B, *grid, C), plus a map `add` of that shape if one is given."""
        conv = self.depthwise
        if kernels_chosen(x.device, conv_obstacle, x.shape, x.dtype, conv.kernel_size):
            return depthwise_conv(x, conv.weight, conv.bias, add)
        out = conv(x.movedim(-1, 1)).movedim(1, -1)
        return out if add is None else add + out


class MultiHeadAttention(nn.Module):
    """(g, m, C) → the same: multi-head attention inside each of g windows of m tokens.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        qkv_bias: Whether the q, k, v projection has a bias.
        qk_norm: Builds the norm of queries and keys from the head width; None leaves both as they are.
        rotary: Gives the tables by which queries and keys are turned; None leaves them as they are.

    Raises:
        ValueError: If the head count is invalid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: type[nn.Module] | None = None,
        rotary: Rotary | None = None,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {num_heads=} for {dim=}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = qk_norm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = qk_norm(dim // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.rotary = rotary

    def attend_windows(self, windows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns multi-head attention inside each window (windows, m, C), `bias` added to the logits."""
        return self.attend_all(windows, None, bias)[0]

    def attend_all(
        self,
        windows: Tensor,
        registers: Tensor | None,
        bias: Tensor | None = None,
        tables: Sequence[Tensor] = (),
    ) -> tuple[Tensor, Tensor | None]:
        """Returns attention inside each window, whose tokens are joined by the registers of its sample.

        Every token and register of a window attends to all of them. A register's output is the mean of what
        it gets in the windows of its sample. Registers have no position: no table turns them.

        Args:
            windows: (g, m, C), the windows of one sample side by side.
            registers: (b, n, C), or None.
            bias: Added to the logits, registers first, (g or 1, 1 or heads, 1 or n + m, n + m).
            tables: Cosines and sines (windows of one sample, m, d) by which queries and keys are turned.

        Returns:
            The windows (g, m, C), and the registers (b, n, C) or None.
        """
        qkv, n = self.qkv(windows), 0
        if registers is not None:
            samples, n, _ = registers.shape
            own = repeat(self.qkv(registers), "b n c -> (b g) n c", g=len(windows) // samples)
            qkv = torch.cat([own, qkv], dim=1)
            tables = [F.pad(table, [0, 0, n, 0], value=1 - i) for i, table in enumerate(tables)]
        # Split before the heads are: in the backward pass the three gradients then lie as they are joined.
        q, k, v = (
            rearrange(part, "g m (heads d) -> g heads m d", heads=self.num_heads)
            for part in qkv.chunk(3, dim=-1)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if tables:
            q, k = rotate_windows(q, *tables), rotate_windows(k, *tables)
        out = rearrange(attention(q, k, v, bias), "g heads m d -> g m (heads d)")
        if registers is None:
            return self.proj(out), None
        means = reduce(out[:, :n], "(b g) n c -> b n c", "mean", b=len(registers))
        return self.proj(out[:, n:]), self.proj(means)


def rotate_windows(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns queries or keys (b · g, heads, m, d) turned by tables (g, m, d), alike in every sample."""
    samples = rearrange(x, "(b g) heads m d -> b heads g m d", g=len(cos))
    return rearrange(rotate(samples, cos, sin), "b heads g m d -> (b g) heads m d")


class IwinAttention(MultiHeadAttention):
    """(B, *grid, C) → the same: window attention plus a parallel depthwise convolution, added.

    A grid that the window does not divide is padded at its far ends for attention alone. With `mask` the
    padding is masked out: a token's output does not depend on it, and an axis shorter than the window takes
    the whole axis. With `zeros` every window keeps its size, and zero tokens take part as any other does.

    Args:
        dim: Channels C, a multiple of `num_heads`.
        num_heads: Attention heads.
        window: Window side M, or one per axis.
        kernel: Side of the depthwise kernel, odd, or one per axis; 0 or None leaves the convolution out.
        interleaved: Interleaved windows (the paper's IW-MSA) or contiguous ones (W-MSA).
        rank: Axes of the grid: 1, 2 or 3.
        qkv_bias: Whether the q, k, v projection has a bias.
        qk_norm: Builds the norm of queries and keys from the head width; None leaves both as they are.
        relative_position: Whether a learned bias by head and offset between slots is added to the logits.
        rotary: Turns queries and keys by their coordinates on the map, so that a window knows how far apart
            its tokens are; None leaves them as they are. Of the same rank.
        padding: `mask`, or `zeros` as the authors' detection and segmentation code has it.

    Raises:
        ValueError: If the head count, window, kernel or padding is invalid.

    Source: Iwin paper (arXiv 2507.18405), section III and eqs (1)–(5).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Window,
        kernel: Window | None = 3,
        *,
        interleaved: bool = True,
        rank: int = 2,
        qkv_bias: bool = True,
        qk_norm: type[nn.Module] | None = None,
        relative_position: bool = False,
        rotary: Rotary | None = None,
        padding: str = "mask",
    ):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, rotary=rotary)
        if rank not in CONVS:
            raise ValueError(f"rank must be 1, 2 or 3, got {rank=}")
        if padding not in PADDINGS:
            raise ValueError(f"padding must be one of 'mask', 'zeros', got {padding!r}")
        self.padding = padding
        self.window = per_axis(window, rank, "window")
        self.interleaved = interleaved
        self.relative_position_bias_table = None
        if relative_position:
            offsets = math.prod(2 * m - 1 for m in self.window)
            self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, num_heads))
        self.dwconv = None
        if kernel:
            kernel = per_axis(kernel, rank, "kernel")
            if not all(k % 2 for k in kernel):
                raise ValueError(f"kernel must be odd along every axis, got {kernel=}")
            self.dwconv = DepthwiseConv(dim, kernel)

    def forward(self, x: Tensor, registers: Tensor | None = None) -> Any:
        """Returns IWA(x) + DWConv(x), of the shape of x.

        Args:
            x: Map (B, *grid, C).
            registers: (B, n, C), which every window reads and writes, and the convolution does not see. With
                them the result is a pair: the map, and each register's mean over the windows.
        """
        attended, registers = self.attend_with(x, registers)
        mixed = attended if self.dwconv is None else self.dwconv(x, attended)
        return mixed if registers is None else (mixed, registers)

    def attend(self, x: Tensor) -> Tensor:
        """Returns the window attention of x alone, of the shape of x."""
        return self.attend_with(x, None)[0]

    def attend_with(self, x: Tensor, registers: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the window attention of x, and the registers (B, n, C) if there are any."""
        grid = x.shape[1:-1]
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            # Sides are tensors then; a trace is of one size in any case.
            grid = [int(side) for side in grid]
        # No min() and no -(-a // b): torch.compile can then follow a second size without fixing it.
        window = list(self.window)
        if self.padding == "mask":
            window = [m if m <= side else side for m, side in zip(window, grid, strict=True)]
        padded = [(side + m - 1) // m * m for side, m in zip(grid, window, strict=True)]
        divides = padded == list(grid)
        if self.padding == "zeros" and not divides:
            x = pad_grid(x, padded)  # before q, k and v are projected: their biases then fill the padding
        biased = self.relative_position_bias_table is not None
        norms = (self.q_norm, self.k_norm)
        place = (x.shape, x.dtype, self.num_heads, window, norms, biased)
        n = 0 if registers is None else registers.shape[1]
        if kernels_chosen(x.device, attention_obstacle, *place, self.rotary is not None, n):
            q_weight, k_weight = (getattr(norm, "weight", None) for norm in norms)
            eps = getattr(self.q_norm, "eps", 0.0)
            options = (self.num_heads, window, self.interleaved, q_weight, k_weight, eps)
            mixed = self.proj(window_attention(self.qkv(x), *options))
            return (mixed if divides else cut(mixed, grid)), None
        bias = self.position_bias(window)
        if bias is not None:
            bias = F.pad(bias, [n, 0, n, 0])
        if self.padding == "mask" and not divides:
            bias = self.mask_padding(grid, padded, window, x, bias, n)
            x = pad_grid(x, padded)
        tables = [] if self.rotary is None else self.rotary(padded)
        tables = [partition(table[None], window, self.interleaved) for table in tables]
        windows = partition(x, window, self.interleaved)
        windows, registers = self.attend_all(windows, registers, bias, tables)
        merged = merge(windows, window, padded, self.interleaved)
        return (merged if divides else cut(merged, grid)), registers

    def position_bias(self, window: Sequence[int]) -> Tensor | None:
        """Returns the bias of the logits (1, heads, m, m) in a window of these sides, if there is one."""
        if self.relative_position_bias_table is None:
            return None
        index = relative_index(window, self.window).to(self.relative_position_bias_table.device)
        return rearrange(self.relative_position_bias_table[index], "m n heads -> 1 heads m n")

    def mask_padding(
        self,
        grid: Sequence[int],
        padded: Sequence[int],
        window: Sequence[int],
        x: Tensor,
        bias: Tensor | None,
        registers: int,
    ) -> Tensor:
        """Returns what is added to the logits (windows, 1 or heads, 1 or n + m, n + m), −∞ for padding."""
        real = partition(pad_grid(x.new_ones(1, *grid, 1), padded), window, self.interleaved)
        mask = rearrange(torch.zeros_like(real).masked_fill(real == 0, -math.inf), "g m 1 -> g 1 1 m")
        mask = F.pad(mask, [registers, 0])
        mask = mask if bias is None else mask + bias
        return mask.repeat(x.shape[0], 1, 1, 1)


def relative_index(window: Sequence[int], table_window: Sequence[int]) -> Tensor:
    """Returns which row of a relative position table each pair of slots reads.

    Args:
        window: Sides of the window, at most the table's.
        table_window: Sides M that the table's prod(2M − 1) offsets are for.

    Returns:
        int64 (m, m) with m = prod(window).

    Source: Swin Transformer's relative position bias.
    """
    slots = torch.cartesian_prod(*(torch.arange(m) for m in window)).reshape(-1, len(window))
    index = torch.zeros(len(slots), len(slots), dtype=torch.long)
    for axis, m in enumerate(table_window):
        offset = slots[:, None, axis] - slots[None, :, axis] + m - 1
        index = index * (2 * m - 1) + offset
    return index


def cut(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Returns the map (B, *larger, C) without what lies past the given sides."""
    return x[(slice(None), *(slice(side) for side in grid))]


def pad_grid(x: Tensor, grid: Sequence[int]) -> Tensor:
    """Returns the map (B, *grid, C) with zeros after the end of each axis, up to the given sides."""
    missing = [side - old for side, old in zip(grid, x.shape[1:-1], strict=True)]
    return F.pad(x, [0, 0, *(amount for end in reversed(missing) for amount in (0, end))])
