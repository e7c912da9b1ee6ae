"""Seeds → noise and labels → sampler → LatentSpace → uint8 batches, as an iterator."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from flashdit.classes import balanced_labels, class_ids
from flashdit.flow.guidance import check_interval, evaluations, guide
from flashdit.flow.samplers import ADAPTIVE, make_sampler, time_grid
from flashdit.heap import keep_freed_memory
from flashdit.latents import LatentSpace
from flashdit.models.dit import FlashDiT
from flashdit.registry import unknown
from flashdit.seeds import generator_for
from flashdit.training.checkpoint import LATENTS, find_checkpoint, newest_run, read_state
from flashdit.training.options import DTYPES

__all__ = [
    "Batch",
    "CheckpointGenerator",
    "ImageGenerator",
    "SamplingOptions",
    "balanced_labels",
    "class_ids",
    "load_generator",
    "nfe",
]
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(kw_only=True)
class SamplingOptions:
    """Options of sampling: the whole recipe beside the model and the labels."""

    sampler: str = "euler"
    steps: int = 50
    """Updates of the sampler; an adaptive one takes as many as its tolerances ask for."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is the conditional model, 0 the unconditional one."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance acts, 0 noise and 1 data."""
    shift: float = 1.0
    """Below 1, finer steps near noise."""
    seed: int = 0
    batch_size: int = 100
    """Images generated at once; changes no image."""
    height: int | None = None
    """In pixels; None is the training size."""
    width: int | None = None
    dtype: str = "fp32"
    """`fp32`, or `bf16` or `fp16` for the model's matrix products; the state and the VAE stay in fp32."""
    atol: float = 1e-5
    """Absolute tolerance of an adaptive sampler."""
    rtol: float = 1e-5
    """Relative tolerance of an adaptive sampler."""

    def __str__(self) -> str:
        """Returns what a picture's title says of the sampling."""
        low, high = self.cfg_interval
        steps = "" if self.sampler in ADAPTIVE else f" {self.steps}"
        times = "" if (low, high) == (0, 1) or self.cfg_scale == 1 else f" for t in {low:g} to {high:g}"
        return f"{self.sampler}{steps}, guidance {self.cfg_scale:g}{times}"

    def check(self) -> list[float]:
        """Returns the time grid, or raises ValueError for an option that cannot be."""
        make_sampler(self.sampler, noise=torch.zeros)
        check_interval(self.cfg_interval)
        if not math.isfinite(self.cfg_scale):
            raise ValueError(f"cfg_scale must be finite, got {self.cfg_scale}")
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        for name in ("batch_size", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not (self.atol > 0 and self.rtol > 0):
            raise ValueError(f"atol and rtol must be positive, got {self.atol} and {self.rtol}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        return time_grid(self.steps, self.shift)


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


def nfe(options: SamplingOptions) -> int | None:
    """Returns how many model evaluations one image takes, a guided one counting two.

    None for an adaptive sampler, where it differs by image: `Batch.nfe` has what was measured.
    """
    times, count = options.check(), 0
    if options.sampler in ADAPTIVE:
        return None

    def v(x: Tensor, t: float) -> Tensor:
        nonlocal count
        count += evaluations(t, options.cfg_scale, options.cfg_interval)
        return x

    make_sampler(options.sampler, noise=lambda _step: torch.zeros(1))(v, torch.zeros(1), times)
    return count


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


def load_model(folder: Path) -> FlashDiT:
    """Returns the frozen FlashDiT of a `save_pretrained` folder.

    Raises:
        ValueError: If the folder holds no FlashDiT, or its weights cannot be read.
    """
    config = folder / "config.json"
    name = json.loads(config.read_text()).get("_class_name") if config.is_file() else "no config.json"
    if name != "FlashDiT":
        raise ValueError(f"a checkpoint must hold a FlashDiT, got {name} in {folder}")
    try:
        model = FlashDiT.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"the FlashDiT in {folder} must be readable: {error}") from error
    return model.eval().requires_grad_(False)


class CheckpointGenerator(ImageGenerator):
    """An ImageGenerator read from a checkpoint: weights, latent space, class names; no data set needed.

    Args:
        checkpoint: A checkpoint folder.
        device: Where to run.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoint's weights: `ema`, the raw `model`, or another of its model folders.

    Raises:
        ValueError: If the checkpoint is not whole, or has no such weights.
    """

    def __init__(
        self, checkpoint: Path, device: torch.device | str, vae: str | None = None, weights: str = "ema"
    ):
        profiles = [path.parent.name for path in checkpoint.glob("*/config.json")]
        if weights not in profiles:
            raise unknown(f"weights of {checkpoint}", weights, profiles)
        try:
            state = read_state(checkpoint)
            self.data_name: str = state["data_name"]
            self.step: int = state["step"]
            self.sampling = SamplingOptions(**state["sampling"])
            class_names = list(state["class_names"])
            space = LatentSpace.load(checkpoint / LATENTS, vae)
        except (KeyError, TypeError, AttributeError, JSONDecodeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"a checkpoint must be whole and of a FlashDiT, {checkpoint} is not: {error}"
            ) from error
        model = load_model(checkpoint / weights)
        channels = model.config["in_channels"]
        if space.mean.shape[1] != channels:
            given = space.mean.shape[1]
            raise ValueError(f"{checkpoint} must hold one model, got {channels} and {given} latent channels")
        model.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        super().__init__(model, space.to(device), class_names)
        self.checkpoint, self.weights = checkpoint, weights
        self.run_dir = checkpoint.parent.parent

    def recipe(self) -> dict[str, Any]:
        """Returns what identifies the model: checkpoint, step, weight hash, VAE, whether it is compiled."""
        digest = hashlib.sha256()
        for path in sorted((self.checkpoint / self.weights).glob("*.safetensors")):
            with path.open("rb") as file:
                while chunk := file.read(2**24):
                    digest.update(chunk)
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "weights": self.weights,
            "weights_sha256": digest.hexdigest(),
            "vae": self.space.options.vae,
            "vae_identity": self.space.identity,
            "compile": self.is_compiled,
        }

    def nfe(self, options: SamplingOptions) -> int | None:
        """Returns how many model evaluations one image takes; None where it differs by image."""
        return nfe(options)


def load_generator(
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
    vae: str | None = None,
    weights: str = "ema",
) -> CheckpointGenerator:
    """Returns the generator of a checkpoint.

    Args:
        checkpoint: A checkpoint folder or a run; None means the newest run.
        device: Where to run.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoint's weights: `ema`, the raw `model`, or another of its model folders.

    Raises:
        ValueError: If there is no checkpoint, or its VAE is missing or another one.
    """
    chosen = newest_run(holding=LATENTS) if checkpoint is None else checkpoint
    return CheckpointGenerator(find_checkpoint(chosen), device, vae, weights)
