"""Small layers of the transformer: norms, MLPs, modulation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashdit.shared.registry import unknown

NORM_EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """(…, C) → the same, divided by its root mean square; in float32 whatever comes, as norms are here."""

    def __init__(self, dim: int, eps: float = NORM_EPS):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normed and scaled tensor in the dtype of x."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """(…, C) → the same: w3(SiLU(a) · b) with a, b the halves of w12(x).

    Args:
        dim: Channels C.
        hidden_dim: Width of a and of b.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gated MLP of x."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GeluMlp(nn.Module):
    """(…, C) → the same: Linear, tanh-GELU, Linear; DiT's MLP."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Returns fc2(GELU(fc1(x)))."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def mlp_width(dim: int, mlp_ratio: float, is_swiglu: bool) -> int:
    """Returns the hidden width of an MLP: mlp_ratio · dim, of SwiGLU 2/3 of it."""
    hidden_dim = int(mlp_ratio * dim)
    return int(2 / 3 * hidden_dim) if is_swiglu else hidden_dim


def make_mlp(name: str, dim: int, mlp_ratio: float) -> nn.Module:
    """Returns the MLP `swiglu` (hidden width 2/3 of mlp_ratio · dim, so both cost the same) or `gelu`."""
    width = mlp_width(dim, mlp_ratio, name == "swiglu")
    if name == "swiglu":
        return SwiGLU(dim, width)
    if name == "gelu":
        return GeluMlp(dim, width)
    raise unknown("mlp", name, ("swiglu", "gelu"))


def make_norm(name: str, dim: int) -> nn.Module:
    """Returns the norm of a block: `rmsnorm` with a scale, or `layernorm` without, both with eps 1e-6."""
    if name == "rmsnorm":
        return RMSNorm(dim)
    if name == "layernorm":
        return nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)
    raise unknown("norm", name, ("rmsnorm", "layernorm"))


def over_tokens(vector: Tensor, x: Tensor) -> Tensor:
    """Returns what a sample has (b, c) so that it holds for every token of x (b, …, c)."""
    return vector[(slice(None), *[None] * (x.ndim - 2))]


def modulate(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Returns x · (1 + scale) + shift; scale and shift (b, c) hold for every token of x (b, …, c)."""
    factor = 1 + over_tokens(scale, x)
    return x * factor if shift is None else torch.addcmul(over_tokens(shift, x), x, factor)
