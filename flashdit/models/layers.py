"""Small layers of the transformer: norms, MLPs, modulation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from flashdit.shared.registry import unknown

NORM_EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """(…, C) → the same, divided by its root mean square; in float32 whatever comes, as norms are here."""

    eps: float

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
        return self.w3(gated_silu(self.w12(x)))


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


def modulate(norm: nn.Module, x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Returns norm(x) · (1 + scale) + shift in the dtype of x.

    Args:
        norm: A norm of `make_norm`.
        x: Tokens (b, …, c).
        scale: Of every token of a sample, (b, c).
        shift: The same; None adds nothing.
    """
    if not isinstance(norm, RMSNorm):
        factor, normed = 1 + over_tokens(scale, x), norm(x)
        return normed * factor if shift is None else torch.addcmul(over_tokens(shift, x), normed, factor)
    factor = over_tokens(norm.weight.float() * (1 + scale.float()), x)
    offset = None if shift is None else over_tokens(shift.float(), x)
    parts = (x, factor, offset)
    if _goes_back(*(part for part in parts if part is not None)):
        return _ScaledRmsNorm.apply(*parts, norm.eps)
    return _scale_normed(*parts, norm.eps)[0]


def gated_silu(x: Tensor) -> Tensor:
    """Returns SiLU(a) · b of the halves a, b of x along its last axis."""
    if _goes_back(x):
        return _GatedSilu.apply(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def _goes_back(*tensors: Tensor) -> bool:
    """Returns whether a backward pass of our own is to follow: torch.compile and forward mode need none."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    is_dual = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    return not is_dual and any(tensor.requires_grad for tensor in tensors)


def _refuse_second_derivative() -> None:
    """Raises RuntimeError in a backward pass that is to be differentiated again (`create_graph`)."""
    if torch.is_grad_enabled():
        raise RuntimeError("FlashDiT's norms and MLPs have no second derivative")


class _GatedSilu(torch.autograd.Function):
    """`gated_silu` whose backward pass writes both halves of the gradient where they lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Returns SiLU(a) · b."""
        gate, value = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Returns the gradient of x."""
        _refuse_second_derivative()
        x, activated = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_value = grad_x.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return grad_x


def _scale_normed(x: Tensor, factor: Tensor, offset: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x / RMS(x) · factor + offset in the dtype of x, computed in float32, and 1 / RMS(x)."""
    wide = x.float()
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
    inverse = (mean_square + eps).rsqrt()
    normed = wide * inverse
    out = normed * factor if offset is None else torch.addcmul(offset, normed, factor)
    return out.to(x.dtype), inverse


class _ScaledRmsNorm(torch.autograd.Function):
    """`_scale_normed` with a backward pass of a few operations over the tokens; autograd's has a dozen.

    It keeps x and one number a token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, offset: Tensor | None, eps: float) -> Tensor:
        """Returns the scaled tokens (b, …, c); factor and offset are (b, 1, …, c) in float32."""
        out, inverse = _scale_normed(x, factor, offset, eps)
        ctx.save_for_backward(x, factor, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        """Returns the gradients; with n = x / r, that of x is (g · f − n · mean(g · f · n)) / r."""
        _refuse_second_derivative()
        x, factor, inverse = ctx.saved_tensors
        tokens = tuple(range(1, x.ndim - 1))
        wide, normed = grad.float(), x.float() * inverse
        product = wide * normed
        mean = torch.matmul(product.flatten(1, -2), factor.reshape(len(x), -1, 1)) / x.shape[-1]
        grad_factor = product.sum(tokens, keepdim=True)
        grad_offset = wide.sum(tokens, keepdim=True) if ctx.needs_input_grad[2] else None
        grad_x = torch.mul(wide, factor, out=product)  # where nothing is read again
        grad_x.addcmul_(normed, mean.view_as(inverse), value=-1).mul_(inverse)
        return grad_x.to(x.dtype), grad_factor, grad_offset, None
