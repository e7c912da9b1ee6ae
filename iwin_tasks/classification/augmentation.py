"""How training images are changed: timm's transforms and mixing, drawn from (seed, position) alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from flashdit.shared.registry import check_finite, unknown
from flashdit.shared.seeds import generator_for
from iwin_tasks.classification.model import InputFormat

INTERPOLATIONS = ("bilinear", "bicubic")
LEAST_CROP = 0.1
"""Of `crop_pct`: what is resized is so many times as large as what is seen."""
Transform = Callable[[Image.Image], Tensor]


@dataclass(kw_only=True)
class AugmentationOptions:
    """Options of augmentation; the defaults are DeiT's, which the Iwin paper trains with."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the image's area that a training crop has."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width by height of a training crop."""
    hflip: float = 0.5
    """How often an image is mirrored."""
    rotation: float = 0.0
    """Largest turn either way, in degrees."""
    shift: float = 0.0
    """Largest shift either way along each axis, as a share of the side."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Least and largest enlargement about the centre; the border is filled with black."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's description of RandAugment; None leaves it out."""
    color_jitter: float | None = 0.4
    """Strength of jitter in brightness, contrast and saturation; as in timm, RandAugment takes its place."""
    random_erasing: float = 0.25
    """How often a rectangle is replaced by noise."""
    mixup: float = 0.8
    """Alpha of mixup's share; 0 leaves mixup out."""
    cutmix: float = 1.0
    """Alpha of CutMix's share; 0 leaves CutMix out."""
    mix_prob: float = 1.0
    """How often a pair of images is mixed."""
    cutmix_prob: float = 0.5
    """How often, where both are on, a mixed pair is by CutMix and not mixup."""
    label_smoothing: float = 0.1
    """Share of each target that is spread over all classes."""
    interpolation: str | None = None
    """`bilinear` or `bicubic`; None means the model's own."""
    crop_pct: float | None = None
    """Side of the evaluated centre crop by that of the resized image; None means the model's own."""

    def __post_init__(self):
        check_finite(self, "augmentation.")
        for name in ("hflip", "shift", "random_erasing", "mix_prob", "cutmix_prob", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("mixup", "cutmix", "rotation", "color_jitter"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"augmentation.{name} must not be negative, got {getattr(self, name)}")
        for name in ("crop_scale", "crop_ratio", "zoom"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augmentation.{name} must be 0 < least ≤ largest, got {low} and {high}")
        if self.crop_scale[1] > 1:
            raise ValueError(
                "augmentation.crop_scale must be shares of the image, at most 1, "
                f"got {self.crop_scale[0]} and {self.crop_scale[1]}"
            )
        if self.crop_pct is not None and not LEAST_CROP <= self.crop_pct <= 1:
            raise ValueError(f"augmentation.crop_pct must be from {LEAST_CROP} to 1, got {self.crop_pct}")
        if self.interpolation is not None and self.interpolation not in INTERPOLATIONS:
            raise unknown("augmentation.interpolation", self.interpolation, INTERPOLATIONS)
        if self.rand_augment is not None:
            _check_rand_augment(self.rand_augment)


def _check_rand_augment(description: str) -> None:
    """Raises ValueError unless timm understands a description of RandAugment."""
    try:
        rand_augment_transform(description)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            "augmentation.rand_augment must be timm's description such as rand-m9-mstd0.5-inc1, "
            f"got '{description}'"
        ) from error


@contextmanager
def kept_globals() -> Iterator[None]:
    """Puts the states of `random`, NumPy's and torch's global CPU generators back at its end.

    timm draws from all three; whoever calls it stays where a resume would find it.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_globals(seed: int, purpose: str, item: int) -> None:
    """Seeds the three global generators by these alone; to be called within `kept_globals`.

    Args:
        seed: The run's.
        purpose: What is drawn.
        item: Which example or pair.
    """
    drawn = generator_for(seed, purpose, item).initial_seed()
    random.seed(drawn)
    np.random.seed(drawn % 2**32)
    torch.default_generator.manual_seed(drawn)  # torch.manual_seed would seed the accelerator too


def train_transform(options: AugmentationOptions, form: InputFormat) -> Transform:
    """Returns image → augmented, normalised (3, H, W) float32."""
    transform: Any = create_transform(
        form.image_size,
        is_training=True,
        scale=options.crop_scale,
        ratio=options.crop_ratio,
        hflip=options.hflip,
        color_jitter=cast(Any, options.color_jitter),
        auto_augment=options.rand_augment,
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        re_prob=options.random_erasing,
        re_mode="pixel",
    )
    if options.rotation == options.shift == 0 and tuple(options.zoom) == (1, 1):
        return transform
    shift = (options.shift, options.shift)
    affine = RandomAffine(options.rotation, shift, options.zoom, interpolation=InterpolationMode.BILINEAR)
    return Compose([affine, transform])


def held_out_transform(form: InputFormat) -> Transform:
    """Returns image → resized, centre-cropped, normalised (3, H, W) float32; nothing is drawn."""
    transform = create_transform(
        form.image_size,
        interpolation=form.interpolation,
        mean=form.mean,
        std=form.std,
        crop_pct=form.crop_pct,
    )
    return cast(Transform, transform)


def make_mixup(options: AugmentationOptions, num_classes: int) -> Mixup:
    """Returns timm's Mixup over pairs of images; it smooths targets whether it mixes or not."""
    mixup = Mixup(
        options.mixup,
        options.cutmix,
        prob=options.mix_prob,
        switch_prob=options.cutmix_prob,
        label_smoothing=options.label_smoothing,
        num_classes=num_classes,
    )
    mixup.mixup_enabled = options.mixup > 0 or options.cutmix > 0
    return mixup
