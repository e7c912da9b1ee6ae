"""Autoencoders by name: pixels to latents and back, and what tells one from another."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from flashdit.data.ldm import load_ldm_vae
from flashdit.data.sources import companions_of


def load_vae(name: str) -> AutoencoderKL:
    """Returns a frozen AutoencoderKL in evaluation mode.

    Args:
        name: A data set that brings one, a folder of `save_pretrained`, a hub name, or a file
            in LDM's layout, which is converted.

    Raises:
        ValueError: If there is none under this name.
    """
    path = companions_of(name).autoencoder or Path(name)
    if path.is_file():
        return load_ldm_vae(path).eval().requires_grad_(False)
    try:
        vae = AutoencoderKL.from_pretrained(str(path) if path.exists() else name)
    except Exception as error:
        raise ValueError(
            f"vae must be a data set that brings one, a folder or a hub name of an AutoencoderKL, or a file "
            f"in LDM's layout, got '{name}': {error}"
        ) from error
    return vae.eval().requires_grad_(False)


def vae_factor(vae: AutoencoderKL) -> int:
    """Returns how many pixels of a side one latent stands for."""
    return 2 ** (len(vae.config["block_out_channels"]) - 1)


def vae_identity(vae: AutoencoderKL) -> str:
    """Returns the SHA-256 of a VAE's configuration and weights: what tells VAEs apart."""
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, value in sorted(vae.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Returns the VAE latents of images: uint8 (B, 3, H, W) → (B, C, H/f, W/f).

    Args:
        vae: The VAE, where the images shall be encoded.
        images: Pixels.
        noise: Standard normal, (B, C, H/f, W/f): gives samples of the posterior; None gives its means.
    """
    pixels = images.to(vae.device, vae.dtype) / 127.5 - 1
    posterior = vae.encode(pixels).latent_dist  # type: ignore[union-attr]
    if noise is None:
        return posterior.mean.float()
    return posterior.mean.float() + posterior.std.float() * noise.to(vae.device)
