"""Seeds → noise and labels → sampler → LatentSpace → uint8 batches, as an iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdit.data.latents import LatentSpace
from flashdit.flow.guidance import guide
from flashdit.flow.samplers import ADAPTIVE, make_sampler
from flashdit.models.dit import FlashDiT
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.process import keep_freed_memory
from flashdit.shared.seeds import generator_for
from flashdit.training.options import DTYPES

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(kw_only=True)
class Batch:
    """Generated images in order."""

    ids: Tensor
    """(B,) int64: which samples of the seed these are."""
    labels: Tensor
    """(B,) int64."""
    images: Tensor
    """(B, 3, H, W) uint8, on the CPU."""
    nfe: Tensor
    """(B,) int64: model evaluations that each image took, a guided one counting two."""


class ImageGenerator:
    """A trained model with its latent space: labels in, uint8 images out.

    Args:
        model: Velocity model in evaluation mode.
        space: Its latent space, with the VAE.
        class_names: One per class.
    """

    def __init__(self, model: FlashDiT, space: LatentSpace, class_names: list[str]):
        self.model, self.space, self.class_names = model, space, class_names
        self.velocity: Velocity = model
        self.is_compiled = False
        if space.mean.device.type == "cpu":
            keep_freed_memory()
        self.num_classes = model.num_classes
        config = model.config
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])

    def compile(self) -> None:
        """Compiles the model, on a GPU into CUDA graphs: the first batch of each size takes long."""
        compiled = torch.compile(self.model, mode="reduce-overhead")
        # A graph's next run overwrites its output, which a multistep sampler still needs.
        self.velocity = lambda x, t, y: compiled(x, t, y).clone()
        self.is_compiled = True

    def latent_shape(self, options: SamplingOptions) -> tuple[int, int, int]:
        """Returns (C, H, W) of the latents of images of the wanted size.

        Raises:
            ValueError: If a side is no multiple of the VAE's factor times the patch size.
        """
        factor = 2 ** (len(self.space.need_vae().config["block_out_channels"]) - 1)
        multiple = factor * self.model.patch_size
        for name, side in (("height", options.height), ("width", options.width)):
            if side is not None and side % multiple:
                parts = f"the VAE's factor {factor} × the patch size {self.model.patch_size}"
                raise ValueError(f"{name} must be a multiple of {multiple} pixels ({parts}), got {side}")
        channels, *sides = self.shape
        height, width = (
            old if side is None else side // factor
            for old, side in zip(sides, (options.height, options.width), strict=True)
        )
        return channels, height, width

    def noise(
        self, ids: Tensor, seed: int, shape: tuple[int, int, int] | None = None, purpose: str = "noise"
    ) -> Tensor:
        """Returns the noise (B, C, H, W) of samples: it depends on (seed, id), purpose and shape alone."""
        shape = shape or self.shape
        return torch.stack(
            [torch.randn(shape, generator=generator_for(seed, purpose, i)) for i in ids.tolist()]
        )

    @torch.no_grad()
    def generate(
        self, labels: Tensor, options: SamplingOptions, ids: Tensor | None = None
    ) -> Iterator[Batch]:
        """Yields images in batches; sample i has labels[i] and noise (seed, i).

        Args:
            labels: (N,) int64, the label of every sample of the whole set.
            options: How to sample.
            ids: int64, which samples to make, in this order; None makes all N.
        """
        options.check()
        self.latent_shape(options)
        wanted = torch.arange(len(labels)) if ids is None else ids
        for batch in wanted.split(options.batch_size) if len(wanted) else ():
            latents, count = self.latents(batch, labels[batch], options)
            images = self.space.decode(latents).cpu()
            yield Batch(ids=batch, labels=labels[batch], images=images, nfe=count)

    @torch.no_grad()
    def latents(self, ids: Tensor, labels: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor]:
        """Returns the latents of samples and the model evaluations that each took: (B, C, H, W), (B,).

        An adaptive sampler takes them one by one, since one step size for a batch would tie an image to its
        neighbours.

        Args:
            ids: (B,) int64, the numbers of the samples.
            labels: (B,) int64, theirs.
            options: How to sample.
        """
        size = 1 if options.sampler in ADAPTIVE else len(ids)
        parts = [
            self._integrate(*part, options) for part in zip(ids.split(size), labels.split(size), strict=True)
        ]
        counts = torch.tensor([count for _, count in parts]).repeat_interleave(size)
        return torch.cat([latents for latents, _ in parts]), counts

    def _integrate(self, ids: Tensor, labels: Tensor, options: SamplingOptions) -> tuple[Tensor, int]:
        """Returns the latents of samples that share every step, and the evaluations an image took."""
        shape, device, rows = self.latent_shape(options), self.space.mean.device, 0

        def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            nonlocal rows
            rows += len(x)
            with self._precision(options):
                return self.velocity(x, t, y)

        def noise(step: int) -> Tensor:
            return self.noise(ids, options.seed, shape, f"sde {step}").to(device)

        interval = options.cfg_interval
        sampler = make_sampler(
            options.sampler,
            noise,
            atol=options.atol,
            rtol=options.rtol,
            jumps=() if options.cfg_scale == 1 else interval,
        )
        v = guide(model, labels.to(device), self.num_classes, options.cfg_scale, interval)
        latents = sampler(v, self.noise(ids, options.seed, shape).to(device), options.check())
        return latents, rows // len(ids)

    def _precision(self, options: SamplingOptions) -> AbstractContextManager[Any]:
        """Returns the context in which the model's matrix products have the wanted dtype."""
        if options.dtype == "fp32":
            return nullcontext()
        return torch.autocast(self.space.mean.device.type, DTYPES[options.dtype])
