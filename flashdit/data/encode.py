"""Images → VAE → latents: a data source and its latent space, ready to train on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from flashdit.data.autoencoders import encode_images, load_vae, vae_factor
from flashdit.data.inspection import leave_out_unreadable
from flashdit.data.latents import LatentOptions, LatentSpace, channel_statistics
from flashdit.data.shards import LatentShards
from flashdit.data.sources import DATASETS, ImageFolder, MemoryLatents, PixelSource
from flashdit.shared.process import computing_in
from flashdit.shared.seeds import generator_for

BATCH = 64
STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def open_latents(
    data: Mapping[str, Any],
    options: LatentOptions,
    device: torch.device,
    progress: bool = True,
    record: Path | None = None,
) -> tuple[LatentShards | MemoryLatents, LatentSpace]:
    """Returns latents and labels, and the space that normalises them.

    Shards are read as they lie; images are encoded here, once, into memory.

    Args:
        data: Spec of the data set, `{name, **options}`.
        options: The VAE and the multiplier.
        device: Where the VAE encodes.
        progress: Whether to show a bar, where somebody watches.
        record: File of the run that lists an image folder's files; None keeps none.

    Raises:
        ValueError: If the data cannot be read, images come without a VAE, or latents come from another VAE.
    """
    source = DATASETS.build(data)
    vae = load_vae(options.vae) if options.vae else None
    if isinstance(source, LatentShards):
        mean, std = source.statistics() or channel_statistics(source.sample())
        space = LatentSpace(mean, std, options, vae, source.vae_identity)
        check_vae(source, space)
        return source, space
    if vae is None:
        raise ValueError("images need a VAE: give latents.vae, a folder of a diffusers AutoencoderKL")
    if isinstance(source, ImageFolder):
        source = leave_out_unreadable(source, record, progress)
    vae.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    latents = encode_source(vae, source, mirrored=False, progress=progress)
    mirrored = encode_source(vae, source, mirrored=True, progress=progress) if source.mirrors else None
    space = LatentSpace(*channel_statistics(latents), options, vae)
    return MemoryLatents(latents, mirrored, source.labels, source.class_names), space


def check_vae(source: LatentShards, space: LatentSpace) -> None:
    """Raises ValueError if the shards say that they come from another VAE than the space's."""
    made_by = source.vae_identity
    if made_by and space.identity != made_by:
        raise ValueError(
            f"latents.vae must be the VAE of the latents in {source.folder} ({made_by[:12]}), "
            f"got {space.options.vae} ({str(space.identity)[:12]})"
        )


def encode_source(vae: AutoencoderKL, source: PixelSource, mirrored: bool, progress: bool = True) -> Tensor:
    """Returns the VAE latents (N, C, H, W) of all images of a source, on the CPU."""
    encoded = []
    batches = torch.arange(len(source.labels)).split(BATCH)
    for rows in tqdm(batches, "encode", unit="batch", leave=False, disable=None if progress else True):
        images = torch.stack([source.image(int(row)) for row in rows])
        encoded.append(encode_images(vae, images.flip(-1) if mirrored else images).cpu())
    return torch.cat(encoded)


class MirrorEncoder:
    """Images → latents of each image and of its mirror, as they are stored.

    Args:
        vae: The VAE, frozen; it is moved to the device.
        device: Where it runs.
        precision: What it computes in, one of `AUTOCAST`; `tf32` is `fp32` on a CPU.
        dtype: What the latents are stored in, one of `STORED_DTYPES`.
        seed: Of samples of the posterior; None stores its means.
    """

    def __init__(
        self, vae: AutoencoderKL, device: torch.device, precision: str, dtype: str, seed: int | None
    ):
        vae.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        self.vae, self.device, self.seed = vae, device, seed
        self.precision, self.dtype = precision, STORED_DTYPES[dtype]

    def shape(self, image_size: int) -> tuple[int, ...]:
        """Returns the shape (C, H, W) of a latent of images (3, S, S).

        Raises:
            ValueError: If the VAE's factor does not divide the side.
        """
        factor = vae_factor(self.vae)
        if image_size % factor:
            raise ValueError(f"the image size must be a multiple of the VAE's {factor=}, got {image_size}")
        return self.vae.config["latent_channels"], image_size // factor, image_size // factor

    def __call__(self, images: Tensor, rows: list[int]) -> Tensor:
        """Returns latents (2, B, C, H, W) on the CPU: those of the images, and of their mirrors.

        Args:
            images: uint8 (B, 3, S, S).
            rows: Which images these are, (B,): each has its own noise, whatever the batch.
        """
        noise: list[Tensor | None] = [None, None]
        if self.seed is not None:
            noise = list(torch.stack([self._noise(row, images.shape[-1]) for row in rows], 1))
        with computing_in(self.precision, self.device):
            pairs = zip((images, images.flip(-1)), noise, strict=True)
            return torch.stack([encode_images(self.vae, *pair).to(self.dtype).cpu() for pair in pairs])

    def _noise(self, row: int, image_size: int) -> Tensor:
        """Returns the noise of one image and of its mirror, (2, C, H, W)."""
        generator = generator_for(self.seed or 0, "posterior", row)
        return torch.randn(2, *self.shape(image_size), generator=generator)
