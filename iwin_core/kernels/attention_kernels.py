"""Window attention in Triton, forward and backward: every program takes one head of one tile of windows.

q, k and v are read from the map that the qkv projection left, (b, h, w, 3 · heads · d), each token where it
lies, and outputs are written in the same natural layout: nothing is rearranged in memory. Each token belongs
to one window, so no two programs write to one place. Softmax is in float32, in base 2.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# Triton's annotations are of the language inside a kernel, not of what Python passes to it.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwin_core.kernels.tiles import (
    MASKED,
    gradient_of_logits,
    logits_of,
    product,
    read,
    read_upstream,
    rms_norm,
    rms_norm_backward,
    tokens_of,
    work_of,
    write,
)


@triton.jit
def forward_kernel(
    qkv, q_weight, k_weight, out, lse, height, width, scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr,
    PACK_H: tl.constexpr, PACK_W: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Writes attention (b, h, w, heads · d) and the base-2 logarithm of the softmax's sum (b, h, w, heads).

    `scale` carries log2(e). The online softmax runs over the BLOCKS key tiles of the window.
    """
    head, block, p, q0, origin = work_of(height, width, HEADS, MH, MW, PACK_H, PACK_W, BLOCKS)
    qkv += origin * (3 * HEADS * D) + head * D
    query = block * TILE + tl.arange(0, TILE)
    token, real = tokens_of(query, p, q0, height, width, MH, MW, PACK_H, PACK_W, INTERLEAVED)
    q = read(qkv, token * (3 * HEADS * D), real, D, BLOCK_D)
    if NORMED:
        q = rms_norm(q, q_weight, eps, D, BLOCK_D)
    top = tl.full([TILE], MASKED, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, BLOCK_D], tl.float32)
    for other in range(BLOCKS):
        key = other * TILE + tl.arange(0, TILE)
        token_k, real_k = tokens_of(key, p, q0, height, width, MH, MW, PACK_H, PACK_W, INTERLEAVED)
        k = read(qkv + HEADS * D, token_k * (3 * HEADS * D), real_k, D, BLOCK_D)
        v = read(qkv + 2 * HEADS * D, token_k * (3 * HEADS * D), real_k, D, BLOCK_D)
        if NORMED:
            k = rms_norm(k, k_weight, eps, D, BLOCK_D)
        logits = logits_of(q, k, query, key, real_k, scale, MH * MW)
        # Place 0 of a window always has a token, so a real query has a real maximum from the first tile on.
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None] + product(weights.to(v.dtype), v)
        top = new_top
    out += origin * (HEADS * D) + head * D
    write(out, token * (HEADS * D), real, mixed / total[:, None], D, BLOCK_D)
    tl.store(lse + origin * HEADS + head + token * HEADS, top + tl.log2(total), real)


@triton.jit
def write_normed(
    grad_qkv, token, real, grad, x, weight, share, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Writes the gradient by a tile x of q or k, through its norm where there is one."""
    if NORMED:
        grad = rms_norm_backward(grad, x, weight, share, eps, D, BLOCK_D)
    write(grad_qkv, token * (3 * HEADS * D), real, grad, D, BLOCK_D)


@triton.jit
def backward_kernel(
    qkv, q_weight, k_weight, out, lse, grad, grad_qkv, grad_norms, height, width, scale, plain_scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr,
    PACK_H: tl.constexpr, PACK_W: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Writes the gradients by q, k, v where a tile holds whole windows, and this tile's share of the norms'.

    Σ out · grad of a query is Σ weights · (grad vᵀ) over its keys, which are all here: `out` is not read.
    """
    head, _, p, q0, origin = work_of(height, width, HEADS, MH, MW, PACK_H, PACK_W, BLOCKS)
    qkv += origin * (3 * HEADS * D) + head * D
    grad_qkv += origin * (3 * HEADS * D) + head * D
    slot = tl.arange(0, TILE)
    token, real = tokens_of(slot, p, q0, height, width, MH, MW, PACK_H, PACK_W, INTERLEAVED)
    plain_q = read(qkv, token * (3 * HEADS * D), real, D, BLOCK_D)
    plain_k = read(qkv + HEADS * D, token * (3 * HEADS * D), real, D, BLOCK_D)
    v = read(qkv + 2 * HEADS * D, token * (3 * HEADS * D), real, D, BLOCK_D)
    upstream = read(grad + origin * (HEADS * D) + head * D, token * (HEADS * D), real, D, BLOCK_D)
    sums = tl.load(lse + origin * HEADS + head + token * HEADS, real, other=0.0)
    q = plain_q
    k = plain_k
    if NORMED:
        q = rms_norm(plain_q, q_weight, eps, D, BLOCK_D)
        k = rms_norm(plain_k, k_weight, eps, D, BLOCK_D)
    weights = tl.exp2(logits_of(q, k, slot, slot, real, scale, MH * MW) - sums[:, None])
    by_weights = product(upstream, tl.trans(v))
    delta = tl.sum(weights * by_weights, 1)
    by_logits = (weights * (by_weights - delta[:, None])).to(q.dtype)
    grad_v = product(tl.trans(weights.to(v.dtype)), upstream)
    write(grad_qkv + 2 * HEADS * D, token * (3 * HEADS * D), real, grad_v, D, BLOCK_D)
    share = grad_norms + tl.program_id(0).to(tl.int64) * (2 * D)
    grad_k = product(tl.trans(by_logits), q) * plain_scale
    write_normed(
        grad_qkv + HEADS * D,
        token,
        real,
        grad_k,
        plain_k,
        k_weight,
        share + D,
        eps,
        HEADS,
        D,
        BLOCK_D,
        NORMED,
    )
    grad_q = product(by_logits, k) * plain_scale
    write_normed(grad_qkv, token, real, grad_q, plain_q, q_weight, share, eps, HEADS, D, BLOCK_D, NORMED)


@triton.jit
def backward_blocks_kernel(
    qkv, q_weight, k_weight, out, lse, grad, grad_qkv, grad_norms, height, width, scale, plain_scale, eps,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr,
    PACK_H: tl.constexpr, PACK_W: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """The same where a window takes several tiles: a tile stands as keys to all queries, then as queries."""
    head, block, p, q0, origin = work_of(height, width, HEADS, MH, MW, PACK_H, PACK_W, BLOCKS)
    qkv += origin * (3 * HEADS * D) + head * D
    grad_qkv += origin * (3 * HEADS * D) + head * D
    out += origin * (HEADS * D) + head * D
    grad += origin * (HEADS * D) + head * D
    lse += origin * HEADS + head
    share = grad_norms + tl.program_id(0).to(tl.int64) * (2 * D)
    mine = block * TILE + tl.arange(0, TILE)
    token, real = tokens_of(mine, p, q0, height, width, MH, MW, PACK_H, PACK_W, INTERLEAVED)
    plain = read(qkv + HEADS * D, token * (3 * HEADS * D), real, D, BLOCK_D)
    k = plain
    if NORMED:
        k = rms_norm(plain, k_weight, eps, D, BLOCK_D)
    v = read(qkv + 2 * HEADS * D, token * (3 * HEADS * D), real, D, BLOCK_D)
    grad_k = tl.zeros([TILE, BLOCK_D], tl.float32)
    grad_v = tl.zeros([TILE, BLOCK_D], tl.float32)
    for other in range(BLOCKS):
        query = other * TILE + tl.arange(0, TILE)
        token_q, real_q = tokens_of(query, p, q0, height, width, MH, MW, PACK_H, PACK_W, INTERLEAVED)
        q = read(qkv, token_q * (3 * HEADS * D), real_q, D, BLOCK_D)
        if NORMED:
            q = rms_norm(q, q_weight, eps, D, BLOCK_D)
        upstream, delta, sums = read_upstream(out, lse, grad, token_q, real_q, HEADS, D, BLOCK_D)
        weights = tl.exp2(logits_of(q, k, query, mine, real, scale, MH * MW) - sums[:, None])
        grad_v += product(tl.trans(weights.to(v.dtype)), upstream)
        by_logits = gradient_of_logits(weights, upstream, v, delta)
        grad_k += product(tl.trans(by_logits), q)
    write(grad_qkv + 2 * HEADS * D, token * (3 * HEADS * D), real, grad_v, D, BLOCK_D)
    grad_k *= plain_scale
    write_normed(
        grad_qkv + HEADS * D, token, real, grad_k, plain, k_weight, share + D, eps, HEADS, D, BLOCK_D, NORMED
    )
    plain = read(qkv, token * (3 * HEADS * D), real, D, BLOCK_D)
    q = plain
    if NORMED:
        q = rms_norm(plain, q_weight, eps, D, BLOCK_D)
    upstream, delta, sums = read_upstream(out, lse, grad, token, real, HEADS, D, BLOCK_D)
    grad_q = tl.zeros([TILE, BLOCK_D], tl.float32)
    for other in range(BLOCKS):
        key = other * TILE + tl.arange(0, TILE)
        token_k, real_k = tokens_of(key, p, q0, height, width, MH, MW, PACK_H, PACK_W, INTERLEAVED)
        k = read(qkv + HEADS * D, token_k * (3 * HEADS * D), real_k, D, BLOCK_D)
        v = read(qkv + 2 * HEADS * D, token_k * (3 * HEADS * D), real_k, D, BLOCK_D)
        if NORMED:
            k = rms_norm(k, k_weight, eps, D, BLOCK_D)
        weights = tl.exp2(logits_of(q, k, mine, key, real_k, scale, MH * MW) - sums[:, None])
        by_logits = gradient_of_logits(weights, upstream, v, delta)
        grad_q += product(by_logits, k)
    grad_q *= plain_scale
    write_normed(grad_qkv, token, real, grad_q, plain, q_weight, share, eps, HEADS, D, BLOCK_D, NORMED)


@dataclass(frozen=True)
class LaunchPlan:
    """How windows fall on tiles: pack[0] × pack[1] windows to a tile, or `blocks` tiles to a window."""

    pack: tuple[int, int]
    blocks: int
    tile: int
    groups: int


def plan(batch: int, grid: Sequence[int], window: Sequence[int], dtype: torch.dtype) -> LaunchPlan:
    """Returns how the windows of a map fall on tiles.

    A tile of 64 slots is what one warpgroup's matrix instruction takes; float32 fills the registers at 32.

    Args:
        batch: Samples.
        grid: (H, W).
        window: Sides of the window, at most the map's.
        dtype: Of q, k and v.
    """
    tile = 32 if dtype == torch.float32 else 64
    slots = math.prod(window)
    rows, columns = (math.ceil(side / m) for side, m in zip(grid, window, strict=True))
    pack_w = min(columns, max(1, tile // slots))
    pack_h = min(rows, max(1, tile // (slots * pack_w)))
    groups = batch * math.ceil(rows / pack_h) * math.ceil(columns / pack_w)
    return LaunchPlan(pack=(pack_h, pack_w), blocks=math.ceil(slots / tile), tile=tile, groups=groups)


def constants(qkv: Tensor, num_heads: int, window: Sequence[int], how: LaunchPlan) -> dict[str, Any]:
    """Returns what the kernels are specialised on, but for INTERLEAVED and NORMED, and compiled by."""
    head_dim = qkv.shape[-1] // (3 * num_heads)
    return {
        "HEADS": num_heads,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "MH": window[0],
        "MW": window[1],
        "PACK_H": how.pack[0],
        "PACK_W": how.pack[1],
        "BLOCKS": how.blocks,
        "TILE": how.tile,
        "num_warps": 8 if how.blocks > 1 and head_dim > 64 else 4,
        "num_stages": 1,  # programs side by side hide the loads; buffers would leave room for fewer
        "enable_fp_fusion": True,
    }


def forward(
    qkv: Tensor,
    num_heads: int,
    window: Sequence[int],
    interleaved: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the attention (b, h, w, heads · d) of qkv (b, h, w, 3 · heads · d), and its lse, base 2."""
    batch, height, width, channels = qkv.shape
    how = plan(batch, (height, width), window, qkv.dtype)
    out = qkv.new_empty(batch, height, width, channels // 3)
    lse = qkv.new_empty(batch, height, width, num_heads, dtype=torch.float32)
    chosen = constants(qkv, num_heads, window, how)
    scale = chosen["D"] ** -0.5 * math.log2(math.e)
    forward_kernel[(how.groups * how.blocks * num_heads,)](
        qkv, q_weight, k_weight, out, lse, height, width, scale, eps,
        INTERLEAVED=interleaved, NORMED=q_weight is not None, **chosen,
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    window: Sequence[int],
    interleaved: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients by qkv (its shape) and by the two norm weights, float32 (2, d)."""
    batch, height, width, _ = qkv.shape
    how = plan(batch, (height, width), window, qkv.dtype)
    chosen = constants(qkv, num_heads, window, how)
    programs = how.groups * how.blocks * num_heads
    normed = q_weight is not None
    grad_qkv = torch.empty_like(qkv)
    shares = qkv.new_empty(programs if normed else 0, 2, chosen["D"], dtype=torch.float32)
    plain_scale = chosen["D"] ** -0.5
    kernel = backward_kernel if how.blocks == 1 else backward_blocks_kernel
    kernel[(programs,)](
        qkv, q_weight, k_weight, out, lse, grad, grad_qkv, shares, height, width,
        plain_scale * math.log2(math.e), plain_scale, eps,
        INTERLEAVED=interleaved, NORMED=normed, **chosen,
    )  # fmt: skip
    return grad_qkv, shares.sum(0)
