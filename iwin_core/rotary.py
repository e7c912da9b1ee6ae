"""Rotary position embedding on maps of any rank: queries and keys are turned by their coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MAX_PERIOD = 10_000.0


def rope_tables(grid: Sequence[int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines of the rotary embedding of every token.

    Args:
        grid: Sides of the map; positions are unscaled.
        head_dim: Width d of a head, a multiple of 2 · rank: d / (2 · rank) frequencies an axis, each twice;
            the first axis first.

    Returns:
        Two float32 (prod(grid), head_dim).

    Raises:
        ValueError: If the head width is none of those.

    Source: LightningDiT's VisionRotaryEmbeddingFast, for any rank.
    """
    rank = len(grid)
    if head_dim % (2 * rank):
        raise ValueError(f"rotary positions need a head width that {2 * rank} divides, got {head_dim}")
    count = head_dim // (2 * rank)
    frequencies = MAX_PERIOD ** -(torch.arange(count).float() / count)
    angles = [
        (torch.arange(side).float()[:, None] * frequencies)
        .repeat_interleave(2, dim=-1)
        .reshape([side if other == axis else 1 for other in range(rank)] + [-1])
        .expand(*grid, -1)
        for axis, side in enumerate(grid)
    ]
    angles = torch.cat(angles, dim=-1).flatten(0, -2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x (…, n, d) turned by position: each pair (x0, x1) becomes (x0, x1)·cos + (−x1, x0)·sin."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # Two to four times as fast; compilers and exports know real numbers alone.
        turned: Any = _ComplexTurn.apply(x, cos, sin)
        return turned
    x0, x1 = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-x1, x0], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)


class _ComplexTurn(torch.autograd.Function):
    """Turns pairs as complex numbers. Only the tables are kept, which the model holds anyway."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns x turned by the angles of the tables."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        turns = torch.complex(cos[..., ::2].to(dtype), sin[..., ::2].to(dtype))
        wide = x.to(dtype)
        if wide.stride(-1) != 1 or any(n % 2 for n in (*wide.stride()[:-1], wide.storage_offset())):
            wide = wide.clone(memory_format=torch.contiguous_format)  # pairs must lie as complex numbers do
        turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turns
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps the tables."""
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradient of x: the upstream one turned back."""
        cos, sin = ctx.saved_tensors
        return _ComplexTurn.apply(upstream, cos, -sin), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *others: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the change of the output: the tangent turned, as the function is linear."""
        return _ComplexTurn.apply(tangent, *ctx.saved_tensors)


class Rotary(nn.Module):
    """Sides of a map → its rotary tables (*grid, d): those of one map are stored, of larger ones computed.

    Args:
        grid: Sides of the stored map. A smaller map's tables are a corner of these.
        head_dim: Width d of a head.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: Sequence[int], head_dim: int):
        super().__init__()
        self.grid, self.head_dim = tuple(grid), head_dim
        for name, table in zip(("cos", "sin"), rope_tables(grid, head_dim), strict=True):
            self.register_buffer(name, table.reshape(*grid, head_dim), persistent=False)

    def forward(self, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the cosines and sines of a map of these sides."""
        if all(side <= stored for side, stored in zip(grid, self.grid, strict=True)):
            corner = tuple(slice(side) for side in grid)
            return self.cos[corner], self.sin[corner]
        cos, sin = (table.reshape(*grid, self.head_dim) for table in rope_tables(grid, self.head_dim))
        return cos.to(self.cos.device), sin.to(self.sin.device)
