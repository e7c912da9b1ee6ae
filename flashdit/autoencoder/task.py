"""An AutoencoderKL on images as a task of the training loop: `AutoencoderTrainer(config).fit()`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from flashdit.autoencoder.config import AutoencoderConfig
from flashdit.autoencoder.losses import PerceptualError, kl_per_number, pixel_error, psnr
from flashdit.data.inspection import RECORD, Inspection, leave_out_unreadable
from flashdit.data.shards import LatentShards
from flashdit.data.sources import DATASETS, ImageFolder, PixelSource
from flashdit.shared.files import write_atomically
from flashdit.shared.pictures import labelled_grid
from flashdit.shared.process import check_model_fits
from flashdit.shared.registry import counted
from flashdit.shared.runs import PREVIEWS
from flashdit.shared.seeds import EpochOrder, generator_for
from flashdit.training.accelerator import start_run
from flashdit.training.loop import TrainingLoop
from flashdit.training.options import share_of_batch
from flashdit.training.task import PeriodicAction, Task, Tensors

logger = logging.getLogger(__name__)
SHOWN_IMAGES = 10
"""Held-out images of the picture of reconstructions."""
RECONSTRUCTED_AT_ONCE = 32


class Reconstructor(AutoencoderKL):
    """An AutoencoderKL whose forward pass returns what its loss needs; its weights are an AutoencoderKL's."""

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the reconstruction of a posterior sample, the posterior's mean and its log variance.

        Args:
            images: (B, 3, H, W) in [−1, 1].
            noise: Standard normal, of the latents' shape (B, C, H/f, W/f).
        """
        (posterior,) = self.encode(cast(Any, images), return_dict=False)
        latents = posterior.mean + posterior.std * noise
        return self.decode(cast(Any, latents), return_dict=False)[0], posterior.mean, posterior.logvar


class ImageExamples(Dataset):
    """Position in the endless stream → one image, mirrored half the time where that is asked for, and noise.

    All that is random comes from (seed, position) alone, so a resume needs only a position.

    Args:
        source: The images.
        rows: Those that are trained on.
        noise_shape: Of the latents, (C, h, w).
        seed: The run's.
    """

    def __init__(self, source: PixelSource, rows: Sequence[int], noise_shape: tuple[int, ...], seed: int):
        self.source, self.rows, self.noise_shape, self.seed = source, rows, noise_shape, seed
        self.order = EpochOrder(len(rows), seed)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Returns image, uint8 (3, H, W), and noise (C, h, w)."""
        generator = generator_for(self.seed, "autoencoder", position)
        image = self.source.image(self.rows[self.order(position)])
        if self.source.mirrors and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return {"image": image, "noise": torch.randn(self.noise_shape, generator=generator)}


class AutoencoderTask(Task[Tensors]):
    """An AutoencoderKL, the images and its loss; every `preview_every` steps the held-out ones are measured.

    Args:
        config: The checked configuration.
        accelerator: Of the run.

    Raises:
        ValueError: If the data set has no images, too few, or of a side that the factor does not divide.
    """

    fixed_on_resume = ("seed", "data.", "held_out_images", "autoencoder.", "loss.")
    by_content = ("data.path",)
    ends_are_kept = True  # a model that was trained on its latents needs it
    model: Reconstructor
    examples: ImageExamples

    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator):
        self.config, self.main, self.device = config, accelerator.is_main_process, accelerator.device
        source = DATASETS.build(config.data)
        if isinstance(source, ImageFolder):
            inspection = Inspection(Path(config.run.dir) / RECORD)
            self.at_start = [inspection.write]
            source = leave_out_unreadable(source, inspection, self.main)
        if isinstance(source, LatentShards) or not hasattr(source, "image"):
            raise ValueError(f"an autoencoder requires a data set of images, got '{config.data['name']}'")
        count, side = len(source.labels), source.image(0).shape[-1]
        if side % config.autoencoder.factor:
            raise ValueError(
                f"the images' side must be a multiple of autoencoder.factor={config.autoencoder.factor}, "
                f"got {side}"
            )
        if count < 2:
            raise ValueError(f"an autoencoder requires 2 images or more, one to be held out, got {count}")
        order = torch.randperm(count, generator=generator_for(config.seed, "held out", 0)).tolist()
        held_out = min(config.held_out_images, max(1, count // 10))
        if self.main:
            logger.info("%s of %s images are held out", f"{held_out:,}", f"{count:,}")
        self.held_out = torch.stack([source.image(row) for row in sorted(order[:held_out])])
        self.arguments = config.autoencoder.arguments(side)
        images = share_of_batch(config.training, accelerator.num_processes), 3, side, side
        check_model_fits(lambda: Reconstructor(**self.arguments), images, self.device)
        self.model = Reconstructor(**self.arguments)
        latent_side = side // config.autoencoder.factor
        self.latent_shape = (config.autoencoder.channels, latent_side, latent_side)
        self.examples = ImageExamples(source, sorted(order[held_out:]), self.latent_shape, config.seed)
        self.images_per_epoch = count - held_out
        self.perceptual = PerceptualError(config.loss.vgg16).to(self.device) if config.loss.vgg16 else None
        self.actions = [PeriodicAction(every=config.training.preview_every, run=self._reconstruct)]

    def loss(self, network: Callable[..., Any], batch: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the weighted sum of the pixels' error, the perceptual one and the divergence."""
        options, images = self.config.loss, batch["image"].float() / 127.5 - 1
        reconstructions, mean, log_variance = (part.float() for part in network(images, batch["noise"]))
        terms = {
            options.pixel: pixel_error(images, reconstructions, options.pixel),
            "kl": kl_per_number(mean, log_variance),
        }
        loss = terms[options.pixel] + options.kl_weight * terms["kl"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, reconstructions)
            loss = loss + options.perceptual_weight * terms["perceptual"]
        return loss, terms

    def blocks(self) -> list[nn.Module]:
        """Returns the levels of encoder and decoder."""
        return [*self.model.encoder.down_blocks, *self.model.decoder.up_blocks]

    def forward_flops(self) -> float:
        """Returns the FLOPs of one forward pass, counted on a model without memory."""
        side = self.held_out.shape[-1]
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            Reconstructor(**self.arguments)(torch.zeros(1, 3, side, side), torch.zeros(1, *self.latent_shape))
        return counter.get_total_flops()

    @cached_property
    def copy(self) -> AutoencoderKL:
        """The one plain AutoencoderKL, frozen, that holds weights to be written or measured."""
        with torch.random.fork_rng(devices=[]):
            return AutoencoderKL(**self.arguments).eval().requires_grad_(False)

    def _holding(self, weights: Tensors) -> AutoencoderKL:
        """Returns the copy with these weights."""
        self.copy.load_state_dict(weights)
        return self.copy

    @torch.no_grad()
    def _reconstruct(self, step: int, average: Tensors) -> dict[str, float]:
        """Measures and draws the held-out images decoded from their posterior means, on the main process."""
        if not self.main:
            return {}
        model = self._holding(average)
        model.to(self.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        images = self.held_out.float() / 127.5 - 1
        decoded = []
        for batch in images.split(RECONSTRUCTED_AT_ONCE):
            latents = model.encode(cast(Any, batch.to(self.device)), return_dict=False)[0].mode()
            decoded.append(model.decode(cast(Any, latents), return_dict=False)[0].float().cpu())
        model.to("cpu")  # pyright: ignore[reportCallIssue, reportArgumentType]
        reconstructions = torch.cat(decoded).clamp(-1, 1)
        value = psnr(images, reconstructions)
        shown = (reconstructions[:SHOWN_IMAGES] * 127.5 + 127.5).round().to(torch.uint8)
        rows = [("held out", [*self.held_out[:SHOWN_IMAGES]]), ("reconstructed", [*shown])]
        grid = labelled_grid(
            rows, f"step {step}, EMA, PSNR {value:.2f} dB of {counted(len(images), 'image')}"
        )
        path = Path(self.config.run.dir) / PREVIEWS / f"step_{step:08d}.png"
        write_atomically(path, lambda temporary: grid.save(temporary, format="png"))
        return {"psnr": value}

    def write_models(self, folder: Path, weights: Tensors, average: Tensors) -> None:
        """Writes the weights and their average as diffusers folders."""
        folder.mkdir()
        self._holding(weights).save_pretrained(folder / "model")
        self._holding(average).save_pretrained(folder / "ema")

    @staticmethod
    def filled(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a plain configuration with the data set's defaults."""
        return {**config, "data": DATASETS.filled(config.get("data"))}

    def contents(self) -> dict[str, Any]:
        """Returns what the data set's files are, wherever they lie."""
        identity = getattr(self.examples.source, "identity", None)
        return {"data.path": None if identity is None else identity()}

    def state(self) -> dict[str, Any]:
        """Returns what a reader of the checkpoint needs to know of the run."""
        return {"data_name": self.config.data["name"]}


def AutoencoderTrainer(config: AutoencoderConfig) -> TrainingLoop[AutoencoderTask]:
    """Returns the loop that trains an autoencoder: `AutoencoderTrainer(config).fit()`.

    A run folder that holds checkpoints is resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """
    accelerator = start_run(config, AutoencoderTask)
    return TrainingLoop(config, AutoencoderTask(config, accelerator), accelerator)
