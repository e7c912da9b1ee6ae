"""What a program of the attention kernels works on: a tile of slots, their tokens, norms and logits (Triton).

A tile has TILE slots. Windows of m = MH · MW tokens that fit share it, PACK_H × PACK_W of one sample, side by
side; a larger one takes several tiles. Slots beyond the windows, and places beyond the map, read as zeros and
are never written.
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# Triton's annotations are of the language inside a kernel, not of what Python passes to it.

from __future__ import annotations

import os

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)  # finite: a spare slot has no key at all, and inf − inf is not a number
# Triton's interpreter multiplies bfloat16 by its bits; float32 holds the products of 16-bit numbers exactly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def product(a, b):
    """Returns a b in float32; of float32 by three tensor-core products, which keep its accuracy."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def work_of(
    height, width, HEADS: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr,
    PACK_H: tl.constexpr, PACK_W: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Returns the program's head, its tile of a window, its first window (p, q), its sample's first token.

    Heads count fastest: neighbouring programs then share the cache lines of a token.
    """
    number = tl.program_id(0)
    group = number // (HEADS * BLOCKS)
    down = tl.cdiv(tl.cdiv(height, MH), PACK_H)
    across = tl.cdiv(tl.cdiv(width, MW), PACK_W)
    origin = (group // (down * across)).to(tl.int64) * (height * width)
    p = group // across % down * PACK_H
    q = group % across * PACK_W
    return number % HEADS, number // HEADS % BLOCKS, p, q, origin


@triton.jit
def tokens_of(
    slot, p, q, height, width, MH: tl.constexpr, MW: tl.constexpr,
    PACK_H: tl.constexpr, PACK_W: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Returns the token of each slot, its number in the flattened map, and whether there is one.

    Divisors here are known to the compiler: division by a number of the launch costs as much as a logit.
    """
    rows = tl.cdiv(height, MH)
    columns = tl.cdiv(width, MW)
    window = slot // (MH * MW)
    p += window // PACK_W
    q += window % PACK_W
    a = slot % (MH * MW) // MW
    b = slot % MW
    if INTERLEAVED:
        row = a * rows + p
        column = b * columns + q
    else:
        row = p * MH + a
        column = q * MW + b
    real = (window < PACK_H * PACK_W) & (p < rows) & (q < columns) & (row < height) & (column < width)
    return row * width + column, real


@triton.jit
def read(base, offset, real, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns a tile (slots, BLOCK_D) that begins at each slot's offset; zeros where no token is."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base + offset[:, None] + d[None, :], real[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def write(base, offset, real, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes a tile where `read` would read it, in the dtype of its place."""
    d = tl.arange(0, BLOCK_D)
    places = base + offset[:, None] + d[None, :]
    tl.store(places, tile.to(base.dtype.element_ty), real[:, None] & (d < D)[None, :])


@triton.jit
def read_weight(weight, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns a norm's weight (1, BLOCK_D) in float32."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(weight + d, d < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def inverse_rms(x, eps, D: tl.constexpr):
    """Returns 1 / √(mean(x²) + eps) of each row (slots, 1) of a float32 tile with zeros beyond D."""
    return tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]


@triton.jit
def rms_norm(x, weight, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns RMSNorm(x) of a tile, computed in float32, in the dtype of x."""
    wide = x.to(tl.float32)
    return (wide * inverse_rms(wide, eps, D) * read_weight(weight, D, BLOCK_D)).to(x.dtype)


@triton.jit
def rms_norm_backward(grad, x, weight, share, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns the gradient by the input of RMSNorm; writes this tile's share of the weight's at `share`."""
    wide = x.to(tl.float32)
    inverse = inverse_rms(wide, eps, D)
    unit = wide * inverse
    d = tl.arange(0, BLOCK_D)
    tl.store(share + d, tl.sum(grad * unit, 0), d < D)
    scaled = grad * read_weight(weight, D, BLOCK_D)
    return inverse * (scaled - unit * (tl.sum(scaled * unit, 1)[:, None] / D))


@triton.jit
def logits_of(q, k, query, key, real_key, scale, M: tl.constexpr):
    """Returns scale · q kᵀ (queries, keys), masked between windows and where no key is."""
    same = (query // M)[:, None] == (key // M)[None, :]
    logits = product(q, tl.trans(k)) * scale
    return tl.where(same & real_key[None, :], logits, MASKED)


@triton.jit
def gradient_of_logits(weights, upstream, v, delta):
    """Returns the gradient of the logits (queries, keys) of a softmax, given Σ out · grad of each query."""
    by_weights = product(upstream, tl.trans(v))
    return (weights * (by_weights - delta[:, None])).to(v.dtype)


@triton.jit
def read_upstream(out, lse, grad, token, real, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns what the backward pass needs of queries: the gradient, Σ out · gradient, and the lse."""
    upstream = read(grad, token * (HEADS * D), real, D, BLOCK_D)
    attended = read(out, token * (HEADS * D), real, D, BLOCK_D)
    delta = tl.sum(upstream.to(tl.float32) * attended.to(tl.float32), 1)
    return upstream, delta, tl.load(lse + token * HEADS, real, other=0.0)
