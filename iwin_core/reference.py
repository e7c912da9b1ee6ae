"""Iwin attention as one global attention under a mask: slow and obvious, the oracle of the tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from iwin_core.windows import Window, per_axis


def window_of(token: Sequence[int], grid: Sequence[int], window: Sequence[int], interleaved: bool) -> tuple:
    """Returns which window a token belongs to.

    With G = ⌈side / M⌉ windows along an axis, interleaved windows take place i mod G, plain ones ⌊i / M⌋.
    """
    if interleaved:
        return tuple(i % math.ceil(side / m) for i, side, m in zip(token, grid, window, strict=True))
    return tuple(i // m for i, m in zip(token, window, strict=True))


def same_window_mask(grid: Sequence[int], window: Window, interleaved: bool = True) -> Tensor:
    """Returns which tokens share a window: bool (N, N) over the flattened grid.

    Args:
        grid: Sides of the map, of any rank; the window need not divide them.
        window: Window side M, or one per axis, cut to the grid's side.
        interleaved: Interleaved or contiguous windows.
    """
    sides = [min(m, side) for m, side in zip(per_axis(window, len(grid), "window"), grid, strict=True)]
    places = [
        window_of(token, grid, sides, interleaved) for token in itertools.product(*(range(s) for s in grid))
    ]
    return torch.tensor([[mine == other for other in places] for mine in places])


def depthwise_conv_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Returns the depthwise convolution of a map (B, *grid, C), summed offset by offset over a zero border.

    Args:
        x: Map (B, *grid, C).
        weight: Kernel (C, 1, *kernel), odd along every axis.
        bias: (C,).
    """
    grid = x.shape[1:-1]
    kernel = weight.shape[2:]
    out = bias.expand_as(x).clone()
    for offset in itertools.product(*(range(k) for k in kernel)):
        shift = [o - k // 2 for o, k in zip(offset, kernel, strict=True)]
        target = tuple(
            slice(max(0, -s), max(0, side - max(0, s))) for s, side in zip(shift, grid, strict=True)
        )
        source = tuple(
            slice(max(0, s), max(0, side + min(0, s))) for s, side in zip(shift, grid, strict=True)
        )
        out[(slice(None), *target)] += x[(slice(None), *source)] * weight[(slice(None), 0, *offset)]
    return out


def iwin_attention_reference(
    x: Tensor,
    weights: Mapping[str, Tensor],
    num_heads: int,
    window: Window,
    interleaved: bool = True,
) -> Tensor:
    """Returns what `IwinAttention` returns, by the explicit formula over all pairs of tokens.

    Args:
        x: Map (B, *grid, C).
        weights: The state dict of an `IwinAttention`; without `dwconv.*` keys there is no convolution.
        num_heads: Attention heads.
        window: Window side M, or one per axis.
        interleaved: Interleaved or contiguous windows.

    Source: Iwin paper, eqs (1)–(5), as softmax(q kᵀ / √d) v where pairs in different windows are at −∞.
    """
    grid = x.shape[1:-1]
    tokens = x.flatten(1, -2)  # (b, n, c)
    qkv = tokens @ weights["qkv.weight"].T + weights.get("qkv.bias", 0.0)
    q, k, v = rearrange(qkv, "b n (three heads d) -> three b heads n d", three=3, heads=num_heads)
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    logits = logits.masked_fill(~same_window_mask(grid, window, interleaved), -math.inf)
    attended = rearrange(logits.softmax(-1) @ v, "b heads n d -> b n (heads d)")
    out = (attended @ weights["proj.weight"].T + weights["proj.bias"]).reshape(x.shape)
    if "dwconv.depthwise.weight" in weights:
        weight, bias = weights["dwconv.depthwise.weight"], weights["dwconv.depthwise.bias"]
        out = out + depthwise_conv_reference(x, weight, bias)
    return out
