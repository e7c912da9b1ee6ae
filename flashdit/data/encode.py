"""Images → autoencoder → latents: a data source and its latent space, ready to train on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashdit.data.autoencoders import Autoencoder, latent_size
from flashdit.data.fit import DataFacts
from flashdit.data.inspection import Inspection, leave_out_unreadable
from flashdit.data.latents import LatentOptions, LatentSpace, channel_statistics
from flashdit.data.pixels import PixelImages, Pixels
from flashdit.data.shards import LatentShards
from flashdit.data.sources import DATASETS, ImageFolder, MemoryLatents, PixelSource
from flashdit.shared.process import computing_in
from flashdit.shared.progress import progress_bar
from flashdit.shared.seeds import generator_for

logger = logging.getLogger(__name__)
BATCH = 64
STORED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DECODED_FOR_COLOUR = 4
COLOURED, GREY = 8.0, 0.25
"""Images whose colour is above the first, in grey levels, must keep more than this share of it."""
Data = LatentShards | MemoryLatents | PixelImages


def open_latents(
    data: Mapping[str, Any],
    options: LatentOptions,
    device: torch.device,
    progress: bool = True,
    inspection: Inspection | None = None,
) -> tuple[Data, LatentSpace]:
    """Returns latents and labels, and the space that normalises them.

    Shards are read as they lie; images are encoded here, once, into memory; pixels are read when they are
    asked for.

    Args:
        data: Spec of the data set, `{name, **options}`.
        options: The space, the autoencoder and the multiplier.
        device: Where the autoencoder encodes.
        progress: Whether to show a bar, where somebody watches, and to warn.
        inspection: Of the run, for the files of an image folder; None keeps nothing of them.

    Raises:
        ValueError: If the data cannot be read, or does not fit the autoencoder or the space.
    """
    source = DATASETS.build(data)
    if isinstance(source, ImageFolder):
        source = leave_out_unreadable(source, inspection, progress)
    if options.space == "pixels":
        _check_images(source, options)
        return PixelImages(source), LatentSpace.of_pixels(options)
    vae = options.autoencoder()
    if isinstance(source, LatentShards):
        mean, std = source.statistics() or channel_statistics(source.sample())
        check_vae(source, options.vae, vae)
        return source, LatentSpace(mean, std, options, vae, source.vae_identity)
    vae = _needed(vae)
    _latent_shape(vae, source)
    vae.to(device)
    if progress:
        warn_of_lost_colour(vae, _images(source, torch.arange(min(BATCH, len(source.labels)))))
    latents = encode_source(vae, source, mirrored=False, progress=progress)
    mirrors = source.mirrors is not False
    mirrored = encode_source(vae, source, mirrored=True, progress=progress) if mirrors else None
    space = LatentSpace(*channel_statistics(latents), options, vae)
    encoded = MemoryLatents(latents, mirrored, source.labels, source.class_names)
    encoded.identity, encoded.images = getattr(source, "identity", None), PixelImages(source).read
    return encoded, space


def data_facts(data: Mapping[str, Any], options: LatentOptions) -> DataFacts:
    """Returns what a model must fit of the data; nothing is encoded for it.

    Args:
        data: Spec of the data set, `{name, **options}`.
        options: The space and the autoencoder.

    Raises:
        ValueError: If the data cannot be read, or do not fit the autoencoder or the space.
    """
    source = DATASETS.build(data)
    vae = options.autoencoder()
    if isinstance(source, LatentShards):
        _check_images(source, options)
        check_vae(source, options.vae, vae)
        return DataFacts(source.shape, source.labels, source.class_names, source.num_classes, vae)
    shape, names = _latent_shape(_needed(vae), source), source.class_names
    return DataFacts(shape, source.labels, names, len(names), vae)


def _check_images(source: Any, options: LatentOptions) -> None:
    """Raises ValueError for latents where pixels are to be trained on."""
    if options.space == "pixels" and isinstance(source, LatentShards):
        raise ValueError(f"latents.space=pixels requires images, got the latents in {source.folder}")


def _needed(vae: Autoencoder | Pixels | None) -> Autoencoder | Pixels:
    """Returns the autoencoder, or says how to give one."""
    if vae is None:
        raise ValueError(
            "images need a VAE: give latents.vae, the folder or hub name of an autoencoder of diffusers, "
            "or train on the images themselves by latents.space=pixels"
        )
    return vae


def _latent_shape(vae: Autoencoder | Pixels, source: PixelSource) -> tuple[int, int, int]:
    """Returns the shape (C, H, W) of the latents of a source's images; the key of their size is named."""
    side = source.image_size if isinstance(source, ImageFolder) else None  # its first one may be unreadable
    height, width = (side, side) if side else source.image(0).shape[1:]
    try:
        return latent_size(vae, height, width)
    except ValueError as error:
        raise ValueError(f"data.image_size: {error}") from error


def check_vae(source: LatentShards, name: str | None, vae: Autoencoder | Pixels | None) -> None:
    """Raises ValueError unless the autoencoder of a name, if there is one, can have made the shards."""
    made_by = source.vae_identity
    if vae is None:
        return
    if made_by and vae.identity != made_by:
        raise ValueError(
            f"latents.vae must be the VAE of the latents in {source.folder} ({made_by[:12]}), "
            f"got {name} ({str(vae.identity)[:12]})"
        )
    if vae.channels != source.shape[0]:
        raise ValueError(
            f"latents.vae must have the {source.shape[0]} channels of the latents in {source.folder}, "
            f"got {name} with {vae.channels}"
        )


def encode_source(
    vae: Autoencoder | Pixels, source: PixelSource, mirrored: bool, progress: bool = True
) -> Tensor:
    """Returns the latents (N, C, H, W) of all images of a source, on the CPU."""
    encoded = []
    batches = torch.arange(len(source.labels)).split(BATCH)
    for rows in progress_bar(
        batches, desc="encode", unit="batch", leave=False, disable=None if progress else True
    ):
        images = _images(source, rows)
        encoded.append(vae.encode(images.flip(-1) if mirrored else images).cpu())
    return torch.cat(encoded)


def _images(source: PixelSource, rows: Tensor) -> Tensor:
    """Returns images of a source, uint8 (B, 3, H, W)."""
    return torch.stack([source.image(row) for row in rows.tolist()])


def colourfulness(pixels: Tensor) -> Tensor:
    """Returns how far the channels of images lie apart: (B, 3, H, W) in grey levels → (B,)."""
    return pixels.float().std(1).mean((1, 2))


def warn_of_lost_colour(vae: Autoencoder | Pixels, images: Tensor) -> None:
    """Warns of an autoencoder that turns coloured images grey, as one trained on grey images does.

    Args:
        vae: The autoencoder, where the images shall be encoded.
        images: uint8 (B, 3, H, W); the most colourful of them are encoded and decoded.
    """
    colour = colourfulness(images)
    chosen = images[colour.argsort(descending=True)[:DECODED_FOR_COLOUR]]
    before = colourfulness(chosen).mean().item()
    if before < COLOURED:
        return
    after = colourfulness(vae.decode(vae.encode(chosen)).cpu().clamp(-1, 1) * 127.5).mean().item()
    if after < GREY * before:
        logger.warning(
            "the autoencoder turns colours grey: channels of the images are %.0f grey levels apart, "
            "%.0f when they are encoded and decoded",
            before,
            after,
        )


class MirrorEncoder:
    """Images → latents of each image and of its mirror, as they are stored.

    Args:
        vae: The autoencoder; it is moved to the device.
        device: Where it runs.
        precision: What it computes in, one of `AUTOCAST`; `tf32` is `fp32` on a CPU.
        dtype: What the latents are stored in, one of `STORED_DTYPES`.
        seed: Of samples of the posterior; None stores its means.

    Raises:
        ValueError: If samples are asked of an autoencoder that has no posterior.
    """

    def __init__(self, vae: Autoencoder, device: torch.device, precision: str, dtype: str, seed: int | None):
        if seed is not None and not vae.has_posterior:
            raise ValueError(f"--sample requires an autoencoder with a posterior, {vae.name} has none")
        vae.to(device)
        self.vae, self.device, self.seed = vae, device, seed
        self.precision, self.dtype = precision, STORED_DTYPES[dtype]

    def shape(self, image_size: int) -> tuple[int, ...]:
        """Returns the shape (C, H, W) of a latent of images (3, S, S).

        Raises:
            ValueError: If the autoencoder takes no images of this side.
        """
        return latent_size(self.vae, image_size, image_size)

    def __call__(self, images: Tensor, rows: list[int]) -> Tensor:
        """Returns latents (2, B, C, H, W) on the CPU: those of the images, and of their mirrors.

        Args:
            images: uint8 (B, 3, S, S).
            rows: Which images these are, (B,): each has its own noise, whatever the batch.
        """
        if 0 in rows:  # the first batch of all processes
            warn_of_lost_colour(self.vae, images)
        noise: list[Tensor | None] = [None, None]
        if self.seed is not None:
            noise = list(torch.stack([self._noise(row, images.shape[-1]) for row in rows], 1))
        with computing_in(self.precision, self.device):
            pairs = zip((images, images.flip(-1)), noise, strict=True)
            return torch.stack([self.vae.encode(*pair).to(self.dtype).cpu() for pair in pairs])

    def _noise(self, row: int, image_size: int) -> Tensor:
        """Returns the noise of one image and of its mirror, (2, C, H, W)."""
        generator = generator_for(self.seed or 0, "posterior", row)
        return torch.randn(2, *self.shape(image_size), generator=generator)
