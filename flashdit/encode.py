"""Images → VAE → latents: a data source and its latent space, ready to train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from flashdit.data.shards import LatentShards
from flashdit.data.sources import DATASETS, MemoryLatents, PixelSource
from flashdit.latents import LatentOptions, LatentSpace, channel_statistics, encode_images, load_vae

BATCH = 64


def open_latents(
    data: Mapping[str, Any], options: LatentOptions, device: torch.device, progress: bool = True
) -> tuple[LatentShards | MemoryLatents, LatentSpace]:
    """Returns latents and labels, and the space that normalises them.

    Shards are read as they lie; images are encoded here, once, into memory.

    Args:
        data: Spec of the data set, `{name, **options}`.
        options: The VAE and the multiplier.
        device: Where the VAE encodes.
        progress: Whether to show a bar, where somebody watches.

    Raises:
        ValueError: If the data cannot be read, or images come without a VAE.
    """
    source = DATASETS.build(data)
    vae = load_vae(options.vae) if options.vae else None
    if isinstance(source, LatentShards):
        mean, std = source.statistics() or channel_statistics(source.sample())
        return source, LatentSpace(mean, std, options, vae)
    if vae is None:
        raise ValueError("images need a VAE: give latents.vae, a folder of a diffusers AutoencoderKL")
    vae.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    latents = encode(vae, source, mirrored=False, progress=progress)
    mirrored = encode(vae, source, mirrored=True, progress=progress) if source.mirrors else None
    space = LatentSpace(*channel_statistics(latents), options, vae)
    return MemoryLatents(latents, mirrored, source.labels, source.class_names), space


def encode(vae: AutoencoderKL, source: PixelSource, mirrored: bool, progress: bool = True) -> Tensor:
    """Returns the VAE latents (N, C, H, W) of all images of a source, on the CPU."""
    encoded = []
    batches = torch.arange(len(source.labels)).split(BATCH)
    for rows in tqdm(batches, "encode", unit="batch", leave=False, disable=None if progress else True):
        images = torch.stack([source.image(int(row)) for row in rows])
        encoded.append(encode_images(vae, images.flip(-1) if mirrored else images).cpu())
    return torch.cat(encoded)
