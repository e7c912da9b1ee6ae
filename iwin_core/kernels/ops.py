"""The kernels as operators of PyTorch, with shapes for tracing and gradients: a compiled graph stays whole.

Triton is imported when an operator first runs; the operators exist without it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("iwin_core::window_attention", mutates_args=())
def window_attention_op(
    qkv: Tensor,
    num_heads: int,
    window: Sequence[int],
    interleaved: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Returns the attention and the logarithm of the softmax's sum (b, h, w, heads), base 2."""
    from iwin_core.kernels import attention_kernels

    with torch.cuda.device_of(qkv):
        return attention_kernels.forward(
            qkv.contiguous(), num_heads, window, interleaved, q_weight, k_weight, eps
        )


@window_attention_op.register_fake
def _(qkv, num_heads, window, interleaved, q_weight, k_weight, eps):
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    return out, qkv.new_empty(batch, height, width, num_heads, dtype=torch.float32)


@torch.library.custom_op("iwin_core::window_attention_backward", mutates_args=())
def window_attention_backward_op(
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
    """Returns the gradients by qkv and, float32 (2, d), by the weights of the norms."""
    from iwin_core.kernels import attention_kernels

    options = (num_heads, window, interleaved, q_weight, k_weight, eps)
    with torch.cuda.device_of(qkv):
        return attention_kernels.backward(grad.contiguous(), qkv.contiguous(), out, lse, *options)


@window_attention_backward_op.register_fake
def _(grad, qkv, out, lse, num_heads, window, interleaved, q_weight, k_weight, eps):
    norms = qkv.new_empty(2, qkv.shape[-1] // (3 * num_heads), dtype=torch.float32)
    return qkv.new_empty(qkv.shape), norms


def _save_attention(ctx: Any, inputs: tuple, output: tuple) -> None:
    """Keeps what the backward pass reads."""
    qkv, num_heads, window, interleaved, q_weight, k_weight, eps = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, out, lse, q_weight, k_weight)
    ctx.options = (num_heads, window, interleaved), eps


def _attention_gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    """Returns a gradient for every argument of the operator."""
    qkv, out, lse, q_weight, k_weight = ctx.saved_tensors
    shape, eps = ctx.options
    grad_qkv, norms = window_attention_backward_op(grad, qkv, out, lse, *shape, q_weight, k_weight, eps)
    if q_weight is None:
        return grad_qkv, None, None, None, None, None, None
    return grad_qkv, None, None, None, norms[0].to(q_weight.dtype), norms[1].to(k_weight.dtype), None


window_attention_op.register_autograd(_attention_gradients, setup_context=_save_attention)


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window: Sequence[int],
    interleaved: bool = True,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Returns multi-head attention within windows (b, h, w, heads · d), in the dtype of qkv.

    Args:
        qkv: What the projection left, (b, h, w, 3 · heads · d).
        num_heads: Attention heads.
        window: Sides of the window, at most the map's; they need not divide it.
        interleaved: Interleaved or contiguous windows.
        q_weight: Weight (d,) of an RMSNorm of queries; None leaves queries and keys as they are.
        k_weight: The same of keys; both or none.
        eps: Of both norms.
    """
    return window_attention_op(qkv, num_heads, list(window), interleaved, q_weight, k_weight, eps)[0]


@torch.library.custom_op("iwin_core::depthwise_conv", mutates_args=())
def depthwise_conv_op(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None) -> Tensor:
    """Returns add + the depthwise convolution of x, all (b, h, w, c)."""
    from iwin_core.kernels import conv_kernels

    add = None if add is None else add.contiguous()
    with torch.cuda.device_of(x):
        return conv_kernels.forward(x.contiguous(), weight.contiguous(), bias, add)


@depthwise_conv_op.register_fake
def _(x, weight, bias, add):
    return x.new_empty(x.shape)


@torch.library.custom_op("iwin_core::depthwise_conv_backward", mutates_args=())
def depthwise_conv_backward_op(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients by x and, in float32, by weight and bias."""
    from iwin_core.kernels import conv_kernels

    with torch.cuda.device_of(x):
        return conv_kernels.backward(grad.contiguous(), x.contiguous(), weight.contiguous())


@depthwise_conv_backward_op.register_fake
def _(grad, x, weight):
    float32 = torch.float32
    weights = weight.new_empty(weight.shape, dtype=float32), x.new_empty(x.shape[-1], dtype=float32)
    return x.new_empty(x.shape), *weights


def _save_conv(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keeps what the backward pass reads."""
    x, weight, bias, add = inputs
    ctx.save_for_backward(x, weight)
    ctx.dtypes = bias.dtype, None if add is None else add.dtype


def _conv_gradients(ctx: Any, grad: Tensor) -> tuple:
    """Returns a gradient for every argument of the operator; `add` takes the output's own."""
    x, weight = ctx.saved_tensors
    bias_dtype, add_dtype = ctx.dtypes
    grad_x, grad_weight, grad_bias = depthwise_conv_backward_op(grad, x, weight)
    grad_add = None if add_dtype is None else grad.to(add_dtype)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias_dtype), grad_add


depthwise_conv_op.register_autograd(_conv_gradients, setup_context=_save_conv)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None = None) -> Tensor:
    """Returns the depthwise convolution of a channels-last map, zeros around it, plus `add`, in one pass.

    Under autocast the map is cast, as PyTorch's own convolution casts it.

    Args:
        x: Map (b, h, w, c).
        weight: (c, 1, kh, kw), odd sides, as `nn.Conv2d` keeps it.
        bias: (c,).
        add: Map (b, h, w, c) that is added, or None.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return depthwise_conv_op(x, weight, bias, add)
