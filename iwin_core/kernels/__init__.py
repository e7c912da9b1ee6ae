"""Fused kernels for CUDA devices, each with an eager twin (`eager`) that it is tested against.

`window_attention` reads q, k, v where the qkv projection left them; `depthwise_conv` adds the convolution to
what it is given (the output projection stands between the two, so they are two passes). `set_backend` or
IWIN_KERNELS chooses; by default they are off until they have passed on a GPU. Second derivatives and
torch.func transforms need the eager form. `attention` is eager code's softmax attention: PyTorch's, or on
some processors a faster way.
"""

from iwin_core.kernels.cpu_attention import attention
from iwin_core.kernels.dispatch import (
    BACKENDS,
    attention_obstacle,
    conv_obstacle,
    kernels_chosen,
    kernels_wait,
    set_backend,
)
from iwin_core.kernels.ops import depthwise_conv, window_attention

__all__ = [
    "BACKENDS",
    "attention",
    "attention_obstacle",
    "conv_obstacle",
    "depthwise_conv",
    "kernels_chosen",
    "kernels_wait",
    "set_backend",
    "window_attention",
]
