"""The whole configuration of an autoencoder's run: composed, loaded from YAML and key=value, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashdit.data.sources import DATASETS
from flashdit.shared.settings import REGISTRY, read_settings
from flashdit.training.ema import EmaOptions
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import RunOptions, TrainingOptions, check_run
from flashdit.training.tracking import TrackingOptions

DEFAULT_AUTOENCODER = "autoencoder/small"
"""The shipped configuration of a run that names none."""
PIXEL_ERRORS = ("l1", "l2")
FACTORS = (1, 2, 4, 8, 16, 32)
MOST_LAYERS = 100
"""Of a level; a deeper one takes long to build and does not train."""
MAX_WIDENING = 4
"""Times the first level's channels that the deepest one has at the most."""


@dataclass(kw_only=True)
class AutoencoderOptions:
    """Sizes of a diffusers AutoencoderKL, checked when made."""

    factor: int = 4
    """Pixels of a side that one latent stands for: 1, 2, 4, 8, 16 or 32."""
    channels: int = 4
    """Numbers of a latent."""
    width: int = 32
    """Feature channels at full size, a multiple of 4; each halving doubles them, up to four times as many."""
    layers_per_block: int = 1
    """Residual layers of each level of the encoder; the decoder has one more."""
    attention: bool = False
    """Whether the middle has self-attention, as Stable Diffusion's has."""

    def __post_init__(self):
        if self.factor not in FACTORS:
            raise ValueError(f"factor must be one of {', '.join(map(str, FACTORS))}, got {self.factor}")
        for name in ("channels", "layers_per_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.layers_per_block > MOST_LAYERS:
            raise ValueError(f"layers_per_block must be at most {MOST_LAYERS}, got {self.layers_per_block}")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width must be a positive multiple of 4, got {self.width}")

    def arguments(self, image_size: int) -> dict[str, Any]:
        """Returns the arguments of an AutoencoderKL for images of a side in pixels."""
        levels = int(math.log2(self.factor)) + 1
        return {
            "block_out_channels": [self.width * min(2**level, MAX_WIDENING) for level in range(levels)],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.channels,
            "norm_num_groups": self.width // 4 if self.width <= 128 else math.gcd(self.width, 32),
            "mid_block_add_attention": self.attention,
            "sample_size": image_size,
        }


@dataclass(kw_only=True)
class ReconstructionOptions:
    """Weights of the terms of an autoencoder's loss, checked when made."""

    pixel: str = "l1"
    """Error of a pixel in [−1, 1]: `l1`, absolute, or `l2`, squared; its mean has weight 1."""
    kl_weight: float = 1e-4
    """Of the KL divergence from a standard normal, a mean over the numbers of the latents."""
    perceptual_weight: float = 0.1
    """Of the perceptual error, where `vgg16` is given."""
    vgg16: str | None = None
    """File of torchvision's VGG16 weights trained on ImageNet; None leaves the perceptual error out."""

    def __post_init__(self):
        if self.pixel not in PIXEL_ERRORS:
            raise ValueError(f"pixel must be l1 or l2, got {self.pixel}")
        for name in ("kl_weight", "perceptual_weight"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")


@dataclass(kw_only=True)
class AutoencoderConfig:
    """Everything an autoencoder's run is made from."""

    seed: int = 0
    """Of everything random in training."""
    run: RunOptions = field(default_factory=RunOptions)
    data: dict[str, Any] = field(default_factory=dict, metadata={REGISTRY: DATASETS})
    """`{name, **options}`, a data set of images."""
    held_out_images: int = 100
    """Images that are not trained on and whose reconstructions are measured; at most a tenth of all."""
    autoencoder: AutoencoderOptions = field(default_factory=AutoencoderOptions)
    loss: ReconstructionOptions = field(default_factory=ReconstructionOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def __post_init__(self):
        if self.held_out_images < 1:
            raise ValueError(f"held_out_images must be at least 1, got {self.held_out_images}")


def load_autoencoder_config(
    path: Path | str | None = None, overrides: Sequence[str] = (), options: Mapping[str, Any] | None = None
) -> AutoencoderConfig:
    """Returns the checked configuration of a YAML file and what the command line says otherwise.

    Args:
        path: YAML that states what differs from the defaults, or a shipped one's name; None means
            autoencoder/small.
        overrides: `key=value` texts with dotted keys.
        options: Values by dotted key, as they are.

    Raises:
        ValueError: If the file, a key or a value is invalid; an unknown key names the nearest known one.
    """
    config = read_settings(path or DEFAULT_AUTOENCODER, overrides, AutoencoderConfig, options)
    check_run(config)
    DATASETS.options(config.data)
    return config
