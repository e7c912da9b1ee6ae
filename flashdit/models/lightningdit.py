"""LightningDiT's checkpoints as FlashDiT models: what configuration they hold, and a strict load."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from flashdit.models.layers import mlp_width
from flashdit.models.sizes import SIZES
from flashdit.models.weights import ROPE_KEYS, fit_weights
from flashdit.shared.weights import read_tensors, unwrap

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
MOST_MLP_RATIO = 16  # of those that are sought as a quarter


def infer_config(state: Mapping[str, Tensor], sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Returns the FlashDiT arguments that a LightningDiT state dict shows, `num_heads` only if known.

    Args:
        state: Official keys and tensors.
        sizes: Known sizes, from which the head count is taken.

    Raises:
        ValueError: If it is not a LightningDiT state dict.
    """
    needed = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ValueError(f"this is no LightningDiT state dict: it lacks {', '.join(missing)}")
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    config: dict[str, Any] = {
        "hidden_size": hidden_size,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "depth": depth,
        "mlp_ratio": _mlp_ratio(state, hidden_size),
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "norm": "rmsnorm" if "blocks.0.norm1.weight" in state else "layernorm",
        "mlp": "swiglu" if "blocks.0.mlp.w12.weight" in state else "gelu",
        "shift_modulation": state["blocks.0.adaLN_modulation.1.weight"].shape[0] == 6 * hidden_size,
        "position_embedding": "sincos",
        "attention": {"name": "global", "rope": True},
    }
    if "pos_embed" in state:
        config["sample_size"] = math.isqrt(state["pos_embed"].shape[1]) * patch_size
        config["attention"]["rope"] = ROPE_KEYS[0] in state
    head_dim = next(
        (state[k].shape[-1] for k in ("blocks.0.attn.q_norm.weight", ROPE_KEYS[0]) if k in state), 0
    )
    if head_dim:
        config["num_heads"] = hidden_size // head_dim
    for size in sizes.values():
        if not head_dim and (size["hidden_size"], size["depth"]) == (hidden_size, depth):
            config["num_heads"] = size["num_heads"]
    return config


def _mlp_ratio(state: Mapping[str, Tensor], hidden_size: int) -> float:
    """Returns the least `mlp_ratio` in quarters, or else the exact one, that gives an MLP of this width."""
    swiglu, gelu = "blocks.0.mlp.w3.weight", "blocks.0.mlp.fc2.weight"
    is_swiglu = swiglu in state
    if not is_swiglu and gelu not in state:
        return 4.0  # the load names what is missing
    width = state[swiglu if is_swiglu else gelu].shape[1]
    for quarters in range(1, 4 * MOST_MLP_RATIO + 1):
        if mlp_width(hidden_size, quarters / 4, is_swiglu) == width:
            return quarters / 4
    hidden = next(n for n in range(width, 2 * width + 2) if not is_swiglu or int(2 / 3 * n) == width)
    return (hidden + 0.5) / hidden_size


def load_lightningdit(
    model_type: type[Model], source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any]
) -> Model:
    """Returns a FlashDiT with the weights of a LightningDiT checkpoint, in evaluation mode.

    Without overrides it is LightningDiT: global attention with RoPE and the sin-cos table. With
    `attention={"name": "iwin", ...}` the projections are kept and the new convolutions start at zero.

    Args:
        model_type: FlashDiT.
        source: A checkpoint file, or its state dict.
        overrides: FlashDiT arguments that replace the inferred ones.

    Raises:
        ValueError: If weights are missing, left over or of another shape, or `num_heads` cannot be inferred.
    """
    state = unwrap(source) if isinstance(source, Mapping) else read_tensors(source)
    config = infer_config(state, SIZES) | dict(overrides)
    if "num_heads" not in config:
        size = f"hidden_size={config['hidden_size']} and depth={config['depth']}"
        raise ValueError(
            f"num_heads must be given: no tensor of these weights shows it, and no known size has {size}"
        )
    model = model_type(**config)
    new = fit_weights(model, state)
    if new:
        logger.warning("not of these weights: %s", "; ".join(new))
    return model.eval()
