"""Which configuration suits a folder of images? What is chosen and why, as commented YAML."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import yaml

from flashdit.data.autoencoders import Autoencoder, latent_size
from flashdit.data.pixels import Pixels
from flashdit.models.sizes import SIZES

LARGEST_GRID, SMALL_GRID, LEAST_GRID = 16, 8, 4
"""Tokens of a side: at most, for a small model on a CPU, and at least."""
FEWEST_FOR_COSINE = 16
"""Channels from which the angle between velocities says something; LightningDiT's have 32."""
EMA_SHARE = 0.04
"""The memory of the averaged weights as a share of the run."""
EVALUATIONS, PREVIEWED, PREVIEW_SHARE = 40, 40, 0.1
"""Of the model for one sample; samples of a preview; the share of the time that previews may take."""
SEEN_AFTER_S, SAVED_AFTER_S, LOGGED_AFTER_S = 180, 300, 30

FOR_SMALL = "  time_scale: 1000.0\n  label_init_std: 1.0\n"
CONFIGURATION = """\
{header}
run:
  dir: {run_dir}  # the same folder resumes
data:
  name: images
  path: {images}
  image_size: {image_size}  # centre squares of this side, in pixels
  mirrors: null  # half the images mirrored where they are encoded, none as pixels; or true, or false
latents:
  {latents}
model:
  in_channels: null  # null: as the data have it
  sample_size: null
  num_classes: null
  class_dropout_prob: 0.1  # share of labels left out: {about_classes}
  patch_size: {patch_size}  # {grid}
{model}  attention: {{name: iwin, window: {window}, kernel: 3}}
{embeddings}flow:
{flow}optimizer:
  lr: {lr}  # {about_lr}
  weight_decay: {weight_decay}
  warmup_steps: {warmup_steps}
  decay_steps: {steps}  # the rate has come to 0 here; raise it with training.steps
ema:
  decay: {decay}  # remembers {memory} of the run
training:
  steps: {steps}  # {epochs} epochs
  global_batch_size: {batch}
  accumulation: {accumulation}  # parts of a batch, so that each fits the memory
  precision: {precision}
  workers: {workers}  # processes that read images
  log_every: {log_every}
  preview_every: {preview_every}  # steps between grids of samples, in the run's samples/
  save_every: {save_every}
  keep_last: 2
sampling:
  sampler: heun
  steps: {sampler_steps}
  cfg_scale: {cfg_scale}  # {about_cfg}
  cfg_interval: [0.1, 1.0]
"""


class Scale(NamedTuple):
    """What suits so many images."""

    up_to: float
    """Images."""
    model: dict[str, int]
    batch: int
    lr: float
    epochs: int
    least: int
    """Steps, whatever the epochs."""
    most: int
    """Steps, whatever the epochs."""


SCALES = (
    Scale(2_000, {"hidden_size": 192, "depth": 6, "num_heads": 3}, 32, 1e-3, 250, 3_000, 12_000),
    Scale(20_000, {"hidden_size": 384, "depth": 8, "num_heads": 6}, 64, 5e-4, 150, 8_000, 40_000),
    Scale(200_000, SIZES["B"], 256, 2e-4, 100, 20_000, 80_000),
    Scale(1_000_000, SIZES["L"], 512, 2e-4, 80, 50_000, 150_000),
    Scale(math.inf, SIZES["XL"], 1024, 2e-4, 64, 70_000, 1_000_000),
)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What depends on the machine's speed and memory."""

    preview_every: int = 1_000
    save_every: int = 1_000
    log_every: int = 100
    accumulation: int = 1


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A configuration for a folder of images.

    Raises:
        ValueError: If no patch size gives a grid of a useful size.
    """

    images: str
    """The folder, an absolute path."""
    num_images: int
    num_classes: int
    image_size: int
    latents: str | None
    """The autoencoder's name; None trains on pixels."""
    space: Autoencoder | Pixels
    run_dir: str
    device: str
    """`cpu`, or a GPU's kind."""
    workers: int
    """Processes that read images."""
    smaller: int = 0
    """Scales below the one that suits so many images, where that one takes too long."""
    pace: Pace = field(default_factory=Pace)

    def __post_init__(self) -> None:
        """Checks that the autoencoder takes the images, and that there is a patch size."""
        try:
            latent_size(self.space, self.image_size, self.image_size)
        except ValueError as error:
            raise ValueError(f"--image-size: {error}") from error
        assert self.patch_size

    @property
    def scale(self) -> Scale:
        """What suits the number of images, or a smaller one."""
        suits = next(place for place, scale in enumerate(SCALES) if self.num_images <= scale.up_to)
        return SCALES[max(0, suits - self.smaller)]

    @property
    def sizes(self) -> dict[str, int]:
        """What the YAML leaves to the data."""
        return {
            "in_channels": self.space.channels,
            "sample_size": self.side,
            "num_classes": self.num_classes,
        }

    @property
    def side(self) -> int:
        """Side of what the model sees: pixels or latents."""
        return self.image_size // self.space.factor

    @property
    def patch_size(self) -> int:
        """Side of a patch: the smallest one whose grid is no larger than wanted."""
        cheaper = self.device == "cpu" and self.scale in SCALES[:2]
        wanted = SMALL_GRID if cheaper and self.image_size <= LARGEST_GRID * SMALL_GRID else LARGEST_GRID
        grid = max(grid for grid in range(1, wanted + 1) if self.side % grid == 0)
        if grid < LEAST_GRID:
            unit = LEAST_GRID * self.space.factor
            raise ValueError(
                f"--image-size must be a multiple of {unit} or of another number that gives {LEAST_GRID} to "
                f"{LARGEST_GRID} patches a side, got {self.image_size}"
            )
        return self.side // grid

    @property
    def steps(self) -> int:
        """Length of the run: a number of epochs within bounds, in hundreds."""
        scale = self.scale
        wanted = scale.epochs * self.num_images / scale.batch
        return round(min(max(wanted, scale.least), scale.most) / 100) * 100

    @property
    def ema_decay(self) -> float:
        """Decay whose memory is `EMA_SHARE` of the run, to two digits of what an update forgets."""
        return 1 - float(f"{1 / (EMA_SHARE * self.steps):.1e}")

    def paced(self, seconds_per_step: float, accumulation: int) -> Pace:
        """Returns how often to preview, save and log, so that something is seen within minutes.

        Args:
            seconds_per_step: Expected, of training.
            accumulation: Parts of a batch that fit the memory.
        """
        guided = 2 if self.num_classes > 1 else 1
        previewed = min(PREVIEWED, 4 * self.num_classes) * EVALUATIONS * guided / 3  # in images trained on
        affordable = previewed / self.scale.batch / PREVIEW_SHARE
        per_s = 1 / seconds_per_step
        return Pace(
            preview_every=round_count(max(affordable, min(SEEN_AFTER_S * per_s, self.steps / 20))),
            save_every=round_count(max(50, min(SAVED_AFTER_S * per_s, self.steps / 10))),
            log_every=round_count(min(LOGGED_AFTER_S * per_s, 100)),
            accumulation=accumulation,
        )

    def to_yaml(self, header: str) -> str:
        """Returns the configuration as commented YAML.

        Args:
            header: Lines of comment that open it.
        """
        scale, steps, pixels, several = self.scale, self.steps, self.latents is None, self.num_classes > 1
        small = scale in SCALES[:2]
        return CONFIGURATION.format(
            header=header,
            run_dir=quoted(self.run_dir),
            images=quoted(self.images),
            image_size=self.image_size,
            latents="space: pixels" if pixels else f"vae: {quoted(str(self.latents))}",
            about_classes="guidance needs it" if several else "one class: it changes little",
            patch_size=self.patch_size,
            grid=f"{self.side} / {self.patch_size} = {self.side // self.patch_size} tokens a side",
            model="".join(f"  {name}: {value}\n" for name, value in scale.model.items()),
            window=LEAST_GRID,
            embeddings=FOR_SMALL if small else "",
            flow=self._flow(),
            lr=f"{scale.lr:.1e}",
            about_lr="large batches and models need less" if small else "LightningDiT's",
            warmup_steps=max(50, steps // 30),
            steps=steps,
            weight_decay=0.01 if small else 0.0,
            decay=f"{self.ema_decay:.8g}",
            memory=f"{1 / (1 - self.ema_decay) / steps:.0%}",
            epochs=f"{steps * scale.batch / self.num_images:,.0f}",
            batch=scale.batch,
            precision="fp32" if self.device == "cpu" else "bf16",
            workers=self.workers,
            **asdict(self.pace),
            sampler_steps=EVALUATIONS // 2,
            cfg_scale=1.5 if several else 1.0,
            about_cfg="above 1: clearer classes, less variety" if several else "one class: no guidance",
        )

    def _flow(self) -> str:
        """Returns the options of flow matching that suit the numbers of a patch."""
        channels = self.space.channels
        numbers = f"{self.patch_size**2 * channels:,} numbers"
        lines = [f"prediction: velocity  # a patch has {numbers}"]
        if self.latents is None:
            lines = [
                f"prediction: data  # a patch has {numbers}: the image is easier to predict than v",
                "times: {name: logit_normal, mean: -0.8, std: 0.8}  # JiT's: pixels need more noise",
            ]
        if channels < FEWEST_FOR_COSINE:
            lines.append("loss: {cosine_weight: 0.0}  # the angle over few channels says little")
        return "".join(f"  {line}\n" for line in lines)


def round_count(value: float) -> int:
    """Returns the largest of 10, 20, 25, 50, 100, 200, 250 … that is at most a value, or 10."""
    power = 10 ** math.floor(math.log10(max(value, 10)))
    return int(max(step * power for step in (1, 2, 2.5, 5) if step * power <= max(value, 10)))


def quoted(text: str) -> str:
    """Returns a text as YAML has it between double quotes, on one line."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=math.inf).rstrip("\n")
