"""Seeds → noise and labels → sampler → LatentSpace → uint8 batches, as an iterator."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from flashdit.data.autoencoders import latent_size
from flashdit.data.latents import LatentSpace
from flashdit.flow.guidance import VelocityModel, guide
from flashdit.flow.mean_flow import along, check_guidance
from flashdit.models.dit import FlashDiT
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.pictures import InvalidPixels, invalid_rows
from flashdit.shared.process import check_memory, computing_in, full_float32
from flashdit.shared.seeds import generator_for

logger = logging.getLogger(__name__)
LARGEST_LATENT = 1e4
"""In standard deviations. The data's latents have a few; such large ones decode to one colour, or to none."""


@dataclass(kw_only=True)
class SampleBatch:
    """Generated images in order."""

    ids: Tensor
    """(B,) int64: which samples of the seed these are."""
    labels: Tensor
    """(B,) int64."""
    images: Tensor
    """(B, 3, H, W) uint8, on the CPU."""
    nfe: Tensor
    """(B,) int64: model evaluations that each image took, a guided one counting two."""


def latent_shape(
    model: FlashDiT, space: LatentSpace, height: int | None, width: int | None
) -> tuple[int, int, int]:
    """Returns (C, H, W) of the latents of images.

    Args:
        model: The velocity model.
        space: Its latent space, with the VAE.
        height: Of the images in pixels; None is the training size.
        width: Likewise.

    Raises:
        ValueError: If a side is no multiple of the autoencoder's factor times the patch size, or not the one
            that the autoencoder takes.
    """
    vae, patch, native = space.need_vae(), model.patch_size, model.config["sample_size"]
    factor, sides = space.factor, []
    for name, side in (("height", height), ("width", width)):
        if side is not None and (side < 1 or side % (factor * patch)):
            parts = f"the patch size {patch}"
            if space.options.space != "pixels":
                parts = f"the VAE's factor {factor} × {parts}"
            raise ValueError(f"{name} must be a multiple of {factor * patch} pixels ({parts}), got {side}")
        sides.append(native * factor if side is None else side)
    _, rows, columns = latent_size(vae, sides[0], sides[1])
    return model.config["in_channels"], rows, columns


@cache
def warn_of_guidance(num_classes: int, class_dropout_prob: float, scale: float) -> None:
    """Warns, once for each such model and scale, of guidance by a null label that was never trained."""
    if scale == 1 or (num_classes and class_dropout_prob):
        return
    if num_classes:
        rule = "guidance requires a model that trained on dropped labels: its null label is untrained noise"
        logger.warning("%s, got cfg_scale=%g with class_dropout_prob=0", rule, scale)
    else:
        logger.warning("guidance changes nothing in a model without classes, got cfg_scale=%g", scale)


def check_channels(channels: int | None, model: FlashDiT, called: str = "cfg_channels") -> None:
    """Raises ValueError if more channels are to be guided than a model has; None guides all."""
    has = model.config["in_channels"]
    if channels is not None and not 1 <= channels <= has:
        raise ValueError(f"{called} must be 1 to the model's {has} channels, got {channels}")


def check_model_guidance(
    model: FlashDiT,
    scale: float,
    interval: tuple[float, float],
    channels: int | None,
    *,
    by_guide: bool,
    called: str = "cfg_channels",
) -> None:
    """Refuses guidance that a model has no way to follow; warns of a null label that was not trained.

    Args:
        model: That is guided.
        scale: Guidance scale.
        interval: Times in which it acts.
        channels: How many channels are guided; None guides all.
        by_guide: Whether away from a worse model, instead of the null label.
        called: What messages call `channels`.

    Raises:
        ValueError: If there are fewer channels, or a model of mean flows is to be guided otherwise than it
            was trained for.
    """
    check_channels(channels, model, called)
    most = model.config["most_guidance"]
    if most is not None:
        if by_guide or channels is not None:
            raise ValueError("a model of mean flows has guidance as a condition, and takes no other kind")
        check_guidance(scale, interval, most)
    elif not by_guide:
        warn_of_guidance(model.num_classes, model.class_dropout_prob, scale)


def check_latents(
    latents: Tensor, model: FlashDiT, space: LatentSpace, sampling: str, ids: Sequence[int] | None = None
) -> None:
    """Refuses sampled latents that no picture can be made of.

    Args:
        latents: Normalised (B, C, H, W).
        model: What they were sampled from.
        space: What they lie in.
        sampling: Its options that may be to blame, for the message.
        ids: The numbers of the samples; None counts them from 0.

    Raises:
        InvalidPixels: If a value is not finite, or far beyond what latents normalise to.
    """
    most = LARGEST_LATENT * abs(space.options.multiplier)
    rows = invalid_rows(latents, most)
    if not rows:
        return
    weights = [(name, weight) for name, weight in model.named_parameters() if not weight.is_meta]
    bad = [name for name, weight in weights if not weight.isfinite().all()]
    hint = f"the model's weights are finite, so look at {sampling}"
    if bad:
        hint = f"{len(bad)} of the model's {len(weights)} weight tensors are not finite, {bad[0]} first"
    raise InvalidPixels(f"sampled latents must be finite and at most {most:g} in size", rows, ids, hint)


@contextmanager
def watching(generator: ImageGenerator, show: Callable[[float], None]) -> Iterator[None]:
    """Has a generator call `show` at every evaluation of its model, within a batch too.

    It is given how many of the images that `generate` makes are sampled, those that are being sampled by
    their time from 0 to 1.
    """
    generator.on_progress = show
    try:
        yield
    finally:
        generator.on_progress = None


class ImageGenerator:
    """A trained model with its latent space: labels in, uint8 images out.

    Args:
        model: Velocity model in evaluation mode.
        space: Its latent space, with the VAE.
        class_names: One per class.
    """

    on_progress: Callable[[float], None] | None = None
    """What `watching` sets; None where nobody watches."""
    guide: ImageGenerator | None = None
    """Of a worse model in the same latent space, which autoguidance leads away from; None is classifier-free
    guidance."""

    def __init__(self, model: FlashDiT, space: LatentSpace, class_names: list[str]):
        self.model, self.space, self.class_names = model, space, class_names
        self.velocity: VelocityModel = model
        self.is_compiled = False
        self.num_classes = model.num_classes
        side = model.config["sample_size"]
        self.shape = (model.config["in_channels"], side, side)

    def compile(self) -> None:
        """Compiles the model, on a GPU into CUDA graphs: the first batch of each size takes long."""
        compiled = torch.compile(self.model, mode="reduce-overhead")
        # A graph's next run overwrites its output, which a multistep sampler still needs.
        self.velocity = lambda x, t, y, **given: compiled(x, t, y, **given).clone()
        self.is_compiled = True

    def check_guidance(self, options: SamplingOptions) -> None:
        """Refuses or warns of guidance as `check_model_guidance` does."""
        scale, interval, channels = options.cfg_scale, options.cfg_interval, options.cfg_channels
        check_model_guidance(self.model, scale, interval, channels, by_guide=self.guide is not None)

    def evaluations(self, options: SamplingOptions) -> int | None:
        """Returns the model evaluations of an image as `options.nfe`, but of mean flows one at each time."""
        is_mean_flow = self.model.config["most_guidance"] is not None
        return (replace(options, cfg_scale=1.0) if is_mean_flow else options).nfe

    def latent_shape(self, options: SamplingOptions) -> tuple[int, int, int]:
        """Returns (C, H, W) of the latents of images of the options' size."""
        return latent_shape(self.model, self.space, options.height, options.width)

    def image_size(self, options: SamplingOptions) -> tuple[int, int]:
        """Returns (H, W) in pixels of the images that are generated with these options."""
        _, height, width = self.latent_shape(options)
        return height * self.space.factor, width * self.space.factor

    def check_batch_fits(self, options: SamplingOptions, count: int) -> None:
        """Raises ValueError if the device's memory cannot hold a batch of so many pictures."""
        latent = math.prod(self.latent_shape(options))
        height, width = self.image_size(options)
        numbers = latent + 3 * height * width
        what = f"{count:,} pictures of {height}×{width} at once"
        check_memory(4.0 * count * numbers, self.space.mean.device, what)

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
    ) -> Iterator[SampleBatch]:
        """Yields images in batches; sample i has labels[i] and noise (seed, i).

        Args:
            labels: (N,) int64, the label of every sample of the whole set.
            options: How to sample.
            ids: int64, which samples to make, in this order; None makes all N.
        """
        self.latent_shape(options)
        self.check_guidance(options)
        wanted = torch.arange(len(labels)) if ids is None else ids
        self.check_batch_fits(options, min(len(wanted), options.batch_size))
        for place, batch in enumerate(wanted.split(options.batch_size) if len(wanted) else ()):
            done = place * options.batch_size
            latents, count = self.latents(batch, labels[batch], options, done)
            sampling = f"cfg_scale={options.cfg_scale:g} and precision={options.precision}"
            check_latents(latents, self.model, self.space, sampling, batch.tolist())
            with full_float32():  # as an evaluation computes: one seed, one picture
                images = self.space.decode(latents, batch.tolist()).cpu()
            yield SampleBatch(ids=batch, labels=labels[batch], images=images, nfe=count)
            self._report(done + len(batch))

    @torch.no_grad()
    def latents(
        self, ids: Tensor, labels: Tensor, options: SamplingOptions, done: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Returns the latents of samples and the model evaluations that each took: (B, C, H, W), (B,).

        An adaptive sampler takes them one by one, since one step size for a batch would tie an image to its
        neighbours.

        Args:
            ids: (B,) int64, the numbers of the samples.
            labels: (B,) int64, theirs.
            options: How to sample.
            done: How many images were sampled before these, for who watches.
        """
        size = 1 if options.is_adaptive else len(ids)
        starts = range(done, done + len(ids), size)
        parts = [
            self._integrate(*part, options)
            for part in zip(starts, ids.split(size), labels.split(size), strict=True)
        ]
        counts = torch.tensor([count for _, count in parts]).repeat_interleave(size)
        return torch.cat([latents for latents, _ in parts]), counts

    def _report(self, images: float) -> None:
        """Says how many images are sampled, to who watches."""
        if self.on_progress is not None and math.isfinite(images):  # dopri5 asks at NaN before it fails
            self.on_progress(images)

    def _integrate(
        self, done: int, ids: Tensor, labels: Tensor, options: SamplingOptions
    ) -> tuple[Tensor, int]:
        """Returns the latents of samples that share every step, and the evaluations an image took."""
        shape, device, rows = self.latent_shape(options), self.space.mean.device, 0

        def counting(velocity: VelocityModel) -> VelocityModel:
            def model(x: Tensor, t: Tensor, y: Tensor, **given: Tensor) -> Tensor:
                nonlocal rows
                rows += len(x)
                with computing_in(options.precision, device):
                    return velocity(x, t, y, **given)

            return model

        def noise(step: int) -> Tensor:
            return self.noise(ids, options.seed, shape, f"sde {step}").to(device)

        if self.model.config["most_guidance"] is not None:
            stretches = options.times if options.sampler_name == "euler" else ()
            guided = along(counting(self.velocity), labels.to(device), options.cfg_scale, stretches)
        else:
            guided = guide(
                counting(self.velocity),
                labels.to(device),
                self.num_classes,
                options.cfg_scale,
                options.cfg_interval,
                options.cfg_channels,
                None if self.guide is None else counting(self.guide.velocity),
            )

        def v(x: Tensor, t: float) -> Tensor:
            self._report(done + len(ids) * t)
            return guided(x, t)

        start = self.noise(ids, options.seed, shape).to(device)
        latents = options.make_sampler(noise)(v, start, options.times)
        return latents, rows // len(ids)
