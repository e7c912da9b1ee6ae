"""The kernels' eager twins: the same functions by PyTorch's own operators, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from iwin_core.windows import merge, partition


def window_attention(
    qkv: Tensor,
    num_heads: int,
    window: Sequence[int],
    interleaved: bool = True,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """Returns what `ops.window_attention` returns, by rearranged copies of q, k and v."""
    height, width = qkv.shape[1:3]
    padded = [-(-side // m) * m for side, m in zip((height, width), window, strict=True)]
    ends = (0, 0, 0, padded[1] - width, 0, padded[0] - height)
    real = partition(F.pad(qkv.new_ones(1, height, width, 1), ends), window, interleaved)
    windows = partition(F.pad(qkv, ends), window, interleaved)
    q, k, v = rearrange(windows, "g m (three heads d) -> three g heads m d", three=3, heads=num_heads)
    q, k = (rms_norm(x, weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    mask = rearrange(real > 0, "g m 1 -> g 1 1 m").repeat(qkv.shape[0], 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if [height, width] == padded else mask)
    out = rearrange(out, "g heads m d -> g m (heads d)")
    return merge(out, window, padded, interleaved)[:, :height, :width]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Returns the RMSNorm of the last axis, by way of float32, in the dtype of x; x itself without weight."""
    if weight is None:
        return x
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None = None) -> Tensor:
    """Returns what `ops.depthwise_conv` returns, by PyTorch's grouped convolution."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    out = F.conv2d(x.movedim(-1, 1), weight, bias, padding=padding, groups=x.shape[-1]).movedim(1, -1)
    return out if add is None else add + out
