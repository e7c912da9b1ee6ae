"""Fused kernels for CUDA devices, each with an eager twin (`eager`) that it is tested against.

`window_attention` reads q, k, v where the qkv projection left them; `depthwise_conv` adds the convolution to
what it is given (the output projection stands between the two, so they are two passes). They are chosen where
device and shapes allow; `set_backend("eager")` or IWIN_KERNELS=eager refuses them. Second derivatives and
torch.func transforms need the eager form.
"""

from iwin_core.kernels.dispatch import (
    BACKENDS,
    attention_obstacle,
    conv_obstacle,
    kernels_chosen,
    set_backend,
)
from iwin_core.kernels.ops import depthwise_conv, window_attention

__all__ = [
    "BACKENDS",
    "attention_obstacle",
    "conv_obstacle",
    "depthwise_conv",
    "kernels_chosen",
    "set_backend",
    "window_attention",
]
