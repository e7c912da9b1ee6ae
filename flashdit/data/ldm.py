"""LDM-layout autoencoder checkpoints, such as LightningDiT's VA-VAE, as a diffusers AutoencoderKL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange
from torch import Tensor

from flashdit.shared.weights import read_tensors

NETWORK = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
NEEDED = (
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.conv1.weight",
    "decoder.conv_in.weight",
    "decoder.conv_out.weight",
)
NORM_GROUPS = 32  # of every norm in LDM's code, which no tensor tells
KEYS = (  # LDM → diffusers; decoder levels are turned round before
    (r"\.down\.(\d+)\.", r".down_blocks.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


def load_ldm_vae(path: Path) -> AutoencoderKL:
    """Returns the AutoencoderKL of an LDM-layout checkpoint, a torch or safetensors file.

    Sizes are read off the tensors. What is no part of the autoencoder (discriminator, losses, the vision
    foundation model that VA-VAE is aligned with) is left out.

    Raises:
        ValueError: If the file cannot be read or is no such checkpoint.
    """
    state = {key: value for key, value in read_tensors(path).items() if key.startswith(NETWORK)}
    absent = [key for key in NEEDED if key not in state]
    if absent:
        raise ValueError(f"an LDM-layout autoencoder must hold {', '.join(NEEDED)}; {path} lacks {absent[0]}")
    vae = AutoencoderKL(**ldm_config(state))
    try:
        vae.load_state_dict(diffusers_state(state))
    except RuntimeError as error:
        raise ValueError(f"{path} must be an AutoencoderKL in LDM's layout: {error}") from error
    return vae


def ldm_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of AutoencoderKL that fit the tensors of an LDM-layout autoencoder."""
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    widths = [state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    down = [f"encoder.down.{level}.attn.0.q.weight" in state for level in range(levels)]
    up = [f"decoder.up.{level}.attn.0.q.weight" in state for level in reversed(range(levels))]
    return {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": _count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in down],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in up],
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": 1.0,
    }


def diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns LDM's tensors under diffusers' keys; attention's 1×1 convolutions become linear layers."""
    levels = _count(state, r"encoder\.down\.(\d+)\.")
    converted = {}
    for key, value in state.items():
        new = diffusers_key(key, levels)
        is_pointwise = ".attentions." in new and value.ndim == 4
        converted[new] = rearrange(value, "o i 1 1 -> o i") if is_pointwise else value
    return converted


def diffusers_key(key: str, levels: int) -> str:
    """Returns diffusers' name of an LDM tensor; LDM counts decoder levels from the image, diffusers to it."""
    key = re.sub(r"\.up\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}.", key)
    for pattern, replacement in KEYS:
        key = re.sub(pattern, replacement, key)
    return key


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Returns how many different numbers a key pattern finds."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})
