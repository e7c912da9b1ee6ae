"""Softmax attention: PyTorch's fused kernel or, on a CPU, two products and a softmax where those are faster.

Which way is the faster depends on shapes, dtype and processor: for bfloat16 gradients of small windows the
fused kernel took up to twelve times as long. A table of measurements decides, cpu_attention.json, which
`python -m benchmarks.windows` makes; nothing is timed when a model runs, and what was not measured is fused.
Of large windows no probabilities are kept: the forward pass is fused, the backward pass has them anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TABLE = Path(__file__).with_suffix(".json")
FUSED, PRODUCTS = "fused", "products"
GAIN = 1.15
"""How many times as fast the products must have been to be chosen."""
KEPT = 196
"""Tokens of the largest window whose probabilities are kept for the backward pass."""
CHUNK = 2**20
"""Probabilities that the backward pass of larger ones has at a time: they stay in the processor's cache."""
BF16_INSTRUCTIONS = ("amx_tile", "avx512_bf16")
"""Those of a processor that multiply bfloat16."""
INSTRUCTIONS = (*BF16_INSTRUCTIONS, "avx512_f", "avx2")  # the fastest first


@cache
def this_processor() -> str:
    """Returns the maker of this machine's processor and its fastest instructions: `AMD avx512_bf16`."""
    found = torch.cpu.get_capabilities()
    maker = str(found.get("cpu_name", "unknown")).replace("(R)", "").split()[0]
    return f"{maker} {next((name for name in INSTRUCTIONS if found.get(name)), 'baseline')}"


@cache
def read_table() -> dict[str, Any]:
    """Returns the measurements by processor."""
    return json.loads(TABLE.read_text())


@cache
def _faster_by_products(processor: str) -> frozenset[tuple[int, int, str, bool]]:
    """Returns the cases (tokens, head width, dtype, gradient) in which products gained enough."""
    rows = read_table().get(processor, {"rows": []})["rows"]
    return frozenset(
        (row["tokens"], row["head_width"], row["dtype"], row["gradient"])
        for row in rows
        if row["fused_ms"] >= GAIN * row["products_ms"]
    )


def cpu_attention(
    tokens: int, head_width: int, dtype: torch.dtype, gradient: bool, processor: str | None
) -> str:
    """Returns the way that was measured to be faster on a processor: `fused` or `products`.

    Args:
        tokens: Of a window.
        head_width: Channels of a head.
        dtype: That products are computed in.
        gradient: Whether a backward pass follows.
        processor: As `this_processor` names it, None for that itself; one without measurements takes `fused`.
    """
    case = (tokens, head_width, str(dtype).removeprefix("torch."), gradient)
    return PRODUCTS if case in _faster_by_products(processor or this_processor()) else FUSED


# For torch.compile: its answer holds as long as what it is asked does.
cpu_attention._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]

_processor: str | None = None


@contextmanager
def attention_of(processor: str | None) -> Iterator[None]:
    """Chooses as on a processor of that name, None for this one; `fused` is PyTorch's kernel everywhere."""
    global _processor
    before, _processor = _processor, processor
    try:
        yield
    finally:
        _processor = before


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns softmax(q·kᵀ/√d + bias)·v.

    Args:
        q: (n, heads, m, d), as k and v.
        k: Keys.
        v: Values.
        bias: Added to the logits, of a shape that expands to (n, heads, m, m).
    """
    if q.device.type == "cpu" and q.shape[-2] == k.shape[-2]:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else q.dtype
        gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        case = (q.shape[-2], q.shape[-1], dtype, gradient)
        if cpu_attention(*case, _processor) == PRODUCTS:
            if q.shape[-2] <= KEPT:
                return by_products(q, k, v, bias)
            if bias is None and not torch.compiler.is_compiling():
                return backward_by_products(*(x.to(dtype) for x in (q, k, v)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns what `attention` does, by two products and a softmax: the probabilities are held in memory."""
    n, heads, m, d = q.shape
    queries, keys, values = (x.reshape(n * heads, m, d) for x in (q, k, v))
    if bias is None:  # beta=0: what is added is not read
        logits = torch.baddbmm(q.new_empty(1, 1, 1), queries, keys.mT, beta=0, alpha=d**-0.5)
    else:
        whole = bias.expand(n, heads, m, m).reshape(n * heads, m, m)
        logits = torch.baddbmm(whole, queries, keys.mT, alpha=d**-0.5)
    return torch.bmm(logits.softmax(dim=-1), values).view(n, heads, m, d)


class _BackwardByProducts(torch.autograd.Function):
    """q, k, v (n, m, d) → fused attention; the backward pass has probabilities anew, a few at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Returns the output (n, m, d)."""
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradients of q, k and v."""
        q, k, v = ctx.saved_tensors
        scale, unread = q.shape[-1] ** -0.5, q.new_empty(1, 1, 1)
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        step = max(1, CHUNK // q.shape[-2] ** 2)
        parts = zip(*(x.split(step) for x in (q, k, v, upstream, *gradients)), strict=True)
        for q_i, k_i, v_i, upstream_i, dq, dk, dv in parts:
            found = torch.baddbmm(unread, q_i, k_i.mT, beta=0, alpha=scale).softmax(dim=-1)
            torch.bmm(found.mT, upstream_i, out=dv)
            towards = torch.bmm(upstream_i, v_i.mT)
            logits = torch.ops.aten._softmax_backward_data(towards, found, -1, found.dtype)
            torch.baddbmm(unread, logits, k_i, beta=0, alpha=scale, out=dq)
            torch.baddbmm(unread, logits.mT, q_i, beta=0, alpha=scale, out=dk)
        return gradients


def backward_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns what `attention` does without bias, in as little memory as the fused kernel takes."""
    n, heads, m, d = q.shape
    out: Any = _BackwardByProducts.apply(*(x.reshape(n * heads, m, d) for x in (q, k, v)))
    return out.view(n, heads, m, d)
