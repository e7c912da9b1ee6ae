"""Seeds → noise and labels → sampler → LatentSpace → uint8 batches, as an iterator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdit.flow.guidance import check_interval, guide, is_guided
from flashdit.flow.samplers import get_sampler, time_grid
from flashdit.latents import LatentSpace
from flashdit.models.dit import FlashDiT
from flashdit.registry import unknown
from flashdit.seeds import generator_for
from flashdit.training.checkpoint import find_checkpoint, read_state


@dataclass(kw_only=True)
class SamplingOptions:
    """Options of sampling: the whole recipe beside the model and the labels."""

    sampler: str = "euler"
    steps: int = 50
    """Updates of the sampler."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is the conditional model."""
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    """Times in which guidance acts, 0 noise and 1 data."""
    shift: float = 1.0
    """Below 1, finer steps near noise."""
    seed: int = 0
    batch_size: int = 100
    """Images generated at once; changes no image."""

    def __str__(self) -> str:
        """Returns what a picture's title says of the sampling."""
        low, high = self.cfg_interval
        times = "" if (low, high) == (0, 1) or self.cfg_scale == 1 else f" for t in {low:g}–{high:g}"
        return f"{self.sampler} {self.steps}, guidance {self.cfg_scale:g}{times}"

    def check(self) -> list[float]:
        """Returns the time grid, or raises ValueError for an option that cannot be."""
        get_sampler(self.sampler)
        check_interval(self.cfg_interval)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
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


def nfe(options: SamplingOptions) -> int:
    """Returns how many model evaluations one image takes, a guided one counting two."""
    count = 0

    def v(x: Tensor, t: float) -> Tensor:
        nonlocal count
        count += 2 if is_guided(t, options.cfg_scale, options.cfg_interval) else 1
        return x

    get_sampler(options.sampler)(v, torch.zeros(1), options.check())
    return count


def balanced_labels(num_images: int, num_classes: int, seed: int) -> Tensor:
    """Returns labels (num_images,) int64, each class as often as any other (± 1), in seeded random order."""
    order = torch.randperm(num_images, generator=generator_for(seed, "labels", 0))
    return (torch.arange(num_images) % max(1, num_classes))[order]


def class_ids(names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Returns the ids of classes given by id or by name.

    Args:
        names: Ids as text, or names.
        class_names: The model's, one per class.

    Raises:
        ValueError: If an id is out of range or a name unknown.
    """
    ids = []
    for name in names:
        if name.lstrip("-").isdigit():
            if not 0 <= int(name) < len(class_names):
                count = len(class_names)
                raise ValueError(f"class {name} is out of range for this {count}-class model (0–{count - 1})")
            ids.append(int(name))
        elif name in class_names:
            ids.append(list(class_names).index(name))
        else:
            raise unknown("class", name, class_names)
    return ids


class ImageGenerator:
    """A trained model with its latent space: labels in, uint8 images out.

    Args:
        model: Velocity model in evaluation mode.
        space: Its latent space, with the VAE.
        class_names: One per class.
    """

    def __init__(self, model: FlashDiT, space: LatentSpace, class_names: list[str]):
        self.model, self.space, self.class_names = model, space, class_names
        self.num_classes = model.num_classes
        config = model.config
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])

    def noise(self, ids: Tensor, seed: int) -> Tensor:
        """Returns the starting noise (B, C, H, W) of samples: it depends on (seed, id) alone."""
        draws = [torch.randn(self.shape, generator=generator_for(seed, "noise", i)) for i in ids.tolist()]
        return torch.stack(draws)

    @torch.no_grad()
    def generate(self, labels: Tensor, options: SamplingOptions) -> Iterator[Batch]:
        """Yields the images of labels (N,) in order; sample i has labels[i] and noise (seed, i)."""
        times, sampler = options.check(), get_sampler(options.sampler)
        self.space.need_vae()
        device = self.space.mean.device
        for ids in torch.arange(len(labels)).split(options.batch_size):
            y = labels[ids].to(device)
            v = guide(self.model, y, self.num_classes, options.cfg_scale, options.cfg_interval)
            latents = sampler(v, self.noise(ids, options.seed).to(device), times)
            yield Batch(ids=ids, labels=labels[ids], images=self.space.decode(latents).cpu())


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
    """An ImageGenerator read from a checkpoint: EMA weights, latent space, class names; no data set needed.

    Args:
        checkpoint: A checkpoint folder.
        device: Where to run.
        vae: Folder of the VAE, where it is no longer where it was in training.
    """

    def __init__(self, checkpoint: Path, device: torch.device | str, vae: str | None = None):
        state = read_state(checkpoint)
        model = load_model(checkpoint / "ema")
        space = LatentSpace.load(checkpoint / "latents.safetensors", vae)
        channels = model.config["in_channels"]
        if space.mean.shape[1] != channels:
            given = space.mean.shape[1]
            raise ValueError(f"{checkpoint} must hold one model, got {channels} and {given} latent channels")
        model.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        super().__init__(model, space.to(device), state["class_names"])
        self.checkpoint = checkpoint
        self.run_dir = checkpoint.parent.parent
        self.data_name: str = state["data_name"]
        self.step: int = state["step"]
        self.sampling = SamplingOptions(**state["sampling"])

    def recipe(self) -> dict[str, Any]:
        """Returns what identifies the model: checkpoint, step, weight hash, VAE."""
        weights = sorted((self.checkpoint / "ema").glob("*.safetensors"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "weights": "ema",
            "weights_sha256": digest,
            "vae": self.space.options.vae,
            "vae_identity": self.space.identity,
        }

    def nfe(self, options: SamplingOptions) -> int:
        """Returns how many model evaluations one image takes."""
        return nfe(options)


def load_generator(
    checkpoint: Path | str | None = None, device: torch.device | str = "cpu", vae: str | None = None
) -> CheckpointGenerator:
    """Returns the generator of a checkpoint.

    Args:
        checkpoint: A checkpoint folder or a run; None means the newest run.
        device: Where to run.
        vae: Folder of the VAE, where it is no longer where it was in training.

    Raises:
        ValueError: If there is no checkpoint, or its VAE is missing or another one.
    """
    return CheckpointGenerator(find_checkpoint(checkpoint), device, vae)
