"""The depthwise convolution of a channels-last map in Triton, forward and backward.

A program takes ROWS × COLUMNS places of BLOCK_C channels, which lie side by side in memory: every load is
coalesced along channels, and the taps' overlapping tiles come from the first-level cache.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# Triton's annotations are of the language inside a kernel, not of what Python passes to it.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def tile_of(height, width, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns the tile's number, its sample's first value, row and column of its places, and its channels."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    number = tl.program_id(0) // blocks
    across = (width + COLUMNS - 1) // COLUMNS
    down = (height + ROWS - 1) // ROWS
    place = tl.arange(0, ROWS * COLUMNS)
    row = number // across % down * ROWS + place // COLUMNS
    column = number % across * COLUMNS + place % COLUMNS
    origin = (number // (across * down)).to(tl.int64) * height * width * C
    return number, origin, row, column, channel


@triton.jit
def read(base, row, column, channel, height, width, C: tl.constexpr):
    """Returns the tile (places, BLOCK_C) of the map at `base` in float32, zeros beyond the map."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = (row * width + column) * C
    mask = inside[:, None] & (channel < C)[None, :]
    return tl.load(base + offset[:, None] + channel[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def write(base, tile, row, column, channel, height, width, C: tl.constexpr):
    """Writes a tile (places, BLOCK_C) in the dtype of its place."""
    offset = (row * width + column) * C
    mask = ((row < height) & (column < width))[:, None] & (channel < C)[None, :]
    tl.store(base + offset[:, None] + channel[None, :], tile.to(base.dtype.element_ty), mask)


@triton.jit
def forward_kernel(
    x, weight, bias, add, out, height, width, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes add + bias + Σ over taps weight · x (b, h, w, c); weight (c, 1, KH, KW) as modules keep it."""
    _, origin, row, column, channel = tile_of(height, width, C, ROWS, COLUMNS, BLOCK_C)
    total = tl.zeros([ROWS * COLUMNS, BLOCK_C], tl.float32)
    total += tl.load(bias + channel, channel < C, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        total += read(add + origin, row, column, channel, height, width, C)
    for i in range(KH):
        for j in tl.static_range(KW):
            tap = tl.load(weight + channel * (KH * KW) + (i * KW + j), channel < C, other=0.0).to(tl.float32)
            seen = read(x + origin, row + (i - KH // 2), column + (j - KW // 2), channel, height, width, C)
            total += seen * tap[None, :]
    write(out + origin, total, row, column, channel, height, width, C)


@triton.jit
def backward_kernel(
    grad, x, weight, grad_x, shares, height, width, C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the gradient by x, and this tile's share (KH · KW + 1, c) of those by weight and bias.

    With the tap's offset o, the gradient by x at a place is Σ weight_o · grad(place − o) and that by weight_o
    is Σ over places x · grad(place − o): one read of the shifted gradient serves both.
    """
    number, origin, row, column, channel = tile_of(height, width, C, ROWS, COLUMNS, BLOCK_C)
    here = read(x + origin, row, column, channel, height, width, C)
    total = tl.zeros([ROWS * COLUMNS, BLOCK_C], tl.float32)
    share = shares + number.to(tl.int64) * ((KH * KW + 1) * C) + channel
    for i in range(KH):
        for j in tl.static_range(KW):
            tap = tl.load(weight + channel * (KH * KW) + (i * KW + j), channel < C, other=0.0).to(tl.float32)
            came = read(grad + origin, row - (i - KH // 2), column - (j - KW // 2), channel, height, width, C)
            total += came * tap[None, :]
            tl.store(share + (i * KW + j) * C, tl.sum(came * here, 0), channel < C)
    upstream = read(grad + origin, row, column, channel, height, width, C)
    tl.store(share + KH * KW * C, tl.sum(upstream, 0), channel < C)
    write(grad_x + origin, total, row, column, channel, height, width, C)


PLACES, CHANNELS = 64, 64  # of a tile: 128 bytes a place in bf16, 32 values a thread


def constants(x: Tensor, kernel: tuple[int, int]) -> dict[str, int]:
    """Returns what the kernels are specialised on, but for ADDED."""
    columns = min(16, triton.next_power_of_2(x.shape[2]))
    channels = min(CHANNELS, max(16, triton.next_power_of_2(x.shape[3])))
    return {
        "C": x.shape[3],
        "KH": kernel[0],
        "KW": kernel[1],
        "ROWS": PLACES // columns,
        "COLUMNS": columns,
        "BLOCK_C": channels,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def tiles(x: Tensor, chosen: dict[str, int]) -> int:
    """Returns how many tiles cover every map of the batch."""
    batch, height, width, _ = x.shape
    return batch * math.ceil(height / chosen["ROWS"]) * math.ceil(width / chosen["COLUMNS"])


def forward(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    """Returns the convolution of x (b, h, w, c) by weight (c, 1, kh, kw), plus bias (c,) and `add`."""
    chosen = constants(x, (weight.shape[2], weight.shape[3]))
    out = torch.empty_like(x)
    grid = (tiles(x, chosen) * math.ceil(x.shape[3] / chosen["BLOCK_C"]),)
    forward_kernel[grid](x, weight, bias, add, out, *x.shape[1:3], ADDED=add is not None, **chosen)
    return out


def backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by x, and in float32 by weight (its shape) and by bias (c,)."""
    chosen = constants(x, (weight.shape[2], weight.shape[3]))
    number = tiles(x, chosen)
    grad_x = torch.empty_like(x)
    shares = x.new_empty(number, weight.shape[2] * weight.shape[3] + 1, x.shape[3], dtype=torch.float32)
    grid = (number * math.ceil(x.shape[3] / chosen["BLOCK_C"]),)
    backward_kernel[grid](grad, x, weight, grad_x, shares, *x.shape[1:3], **chosen)
    total = shares.sum(0)
    return grad_x, total[:-1].T.reshape(weight.shape).contiguous(), total[-1].clone()
