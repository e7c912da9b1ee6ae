"""Activation checkpointing that computes again only what is cheap.

`model.enable_gradient_checkpointing(keep_matmuls)` turns it on.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import iwin_core.kernels  # noqa: F401 - registers the operators that are named below

aten = torch.ops.aten
KEPT_OPERATORS = [
    *(aten.mm.default, aten.addmm.default, aten.bmm.default),
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.iwin_core.window_attention.default,
]
"""Operators whose outputs are kept."""


def keep_matmuls(block: nn.Module, *inputs: Tensor) -> Tensor:
    """Returns block(*inputs); for its backward pass the outputs of matrix products and attention are kept.

    Norms, modulation, SwiGLU, the depthwise convolution and every copy are computed again. A compiled block
    needs none of it: torch.compile recomputes what is cheap by itself.

    Args:
        block: Not compiled.
        *inputs: Of the block.
    """
    contexts = partial(create_selective_checkpoint_contexts, KEPT_OPERATORS)
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)  # pyright: ignore[reportReturnType]
