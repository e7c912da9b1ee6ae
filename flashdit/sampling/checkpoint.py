"""A generator read from a checkpoint: weights, latent space, class names; no data set needed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flashdit.data.latents import LatentSpace
from flashdit.data.sources import spec_of
from flashdit.models.dit import FlashDiT
from flashdit.sampling.generator import ImageGenerator
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.records import change_sampler, current_sampling, reading
from flashdit.shared.process import decided
from flashdit.shared.registry import unknown
from flashdit.shared.runs import (
    LATENTS,
    DamagedCheckpoint,
    check_whole,
    find_checkpoint,
    images_of,
    newest_run,
    read_state,
)
from flashdit.shared.weights import read_model_config
from flashdit.training.checkpoint import stored_config
from flashdit.training.meter import warn_if_slow

logger = logging.getLogger(__name__)
ALWAYS_THERE = ("ema", "model")
"""Weights that every checkpoint has."""
MOST_SHOWN = 60
"""Characters of a value in a message."""


def load_model(folder: Path) -> FlashDiT:
    """Returns the frozen FlashDiT of a `save_pretrained` folder.

    Raises:
        ValueError: If the folder holds no FlashDiT, or its weights cannot be read.
    """
    name = read_model_config(folder).get("_class_name", "no config.json")
    if name != "FlashDiT":
        raise ValueError(f"a checkpoint must hold a FlashDiT, got {name} in {folder}")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"a checkpoint must hold weights, got no .safetensors file in {folder}")
    try:
        model = FlashDiT.from_pretrained(folder)
    except Exception as error:
        raise ValueError(f"the FlashDiT in {folder} must be readable: {error}") from error
    return model.eval().requires_grad_(False)


def check_weights(checkpoint: Path, weights: str) -> None:
    """Raises ValueError unless a checkpoint holds weights of a name, and they and its space are whole."""
    for part in (weights, LATENTS):
        check_whole(checkpoint, part)
    profiles = [path.parent.name for path in checkpoint.glob("*/config.json")]
    if weights not in profiles:
        folders = [path.name for path in checkpoint.iterdir() if path.is_dir()]
        if weights in (*ALWAYS_THERE, *folders):
            raise DamagedCheckpoint(f"{checkpoint} is damaged: it has no {weights}/config.json")
        raise unknown(f"weights of {checkpoint}", weights, profiles)


def hash_weights(folder: Path) -> str:
    """Returns the SHA-256 of the weights' files in a folder as hexadecimal digits."""
    files, digest = sorted(folder.glob("*.safetensors")), hashlib.sha256()
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights any more")
    for path in files:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def shortened(value: Any) -> str:
    """Returns a value as a text of at most one line, for messages."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]} …"


class CheckpointGenerator(ImageGenerator):
    """An ImageGenerator read from a checkpoint: weights, latent space, class names; no data set needed.

    All is read when it is made: a training that goes on may remove the checkpoint afterwards.

    Args:
        checkpoint: A checkpoint folder.
        device: Where to run.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoint's weights: `ema`, the raw `model`, or another of its model folders.

    Attributes:
        weights_sha256: Of the weights' files.
        images_path: Folder of the images that it was trained on; None where it was trained on other data.

    Raises:
        ValueError: If the checkpoint is not whole, or has no such weights.
    """

    def __init__(
        self, checkpoint: Path, device: torch.device | str, vae: str | None = None, weights: str = "ema"
    ):
        check_weights(checkpoint, weights)
        try:
            state = read_state(checkpoint)
            if "sampling" not in state:
                raise TypeError("it is a run of another task")
            self.data_name: str = state["data_name"]
            self.step: int = state["step"]
            self.sampling = SamplingOptions(**current_sampling(state["sampling"]))
            class_names = state["class_names"]
            if not isinstance(class_names, list) or not all(isinstance(name, str) for name in class_names):
                raise TypeError("class_names must be a list of texts")
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
        self.weights_sha256 = hash_weights(checkpoint / weights)
        self._config = stored_config(checkpoint)
        self.images_path = images_of(self._config)

    def guide_by(self, guide: CheckpointGenerator) -> None:
        """Samples by autoguidance from now on.

        Args:
            guide: Of a worse model: a smaller one, or an earlier checkpoint.

        Raises:
            ValueError: If it makes other latents, knows other classes, or is this model itself.
        """
        mine, theirs = self.space, guide.space
        sides = {
            "latent channels": (self.shape[0], guide.shape[0]),
            "sample size": (self.shape[1], guide.shape[1]),
            "latents.space": (mine.options.space, theirs.options.space),
            "autoencoder": (str(mine.identity)[:12], str(theirs.identity)[:12]),
            "latents.multiplier": (mine.options.multiplier, theirs.options.multiplier),
            "latents' mean": (mine.mean.flatten().tolist(), theirs.mean.flatten().tolist()),
            "latents' std": (mine.std.flatten().tolist(), theirs.std.flatten().tolist()),
            "classes": (self.class_names, guide.class_names),
        }
        for name, (wanted, got) in sides.items():
            if wanted != got:
                raise ValueError(
                    f"--guide must have the {name} of the model that it guides, {guide.checkpoint} has "
                    f"{shortened(got)} for {shortened(wanted)}"
                )
        if guide.weights_sha256 == self.weights_sha256:
            raise ValueError(
                f"--guide must be another model than the one that it guides, got the weights of "
                f"{self.checkpoint} twice"
            )
        self.guide = guide

    @property
    def read_from(self) -> str:
        """The folder that it was read from, and that of its guide."""
        return reading(self.recipe())

    @property
    def data_spec(self) -> str:
        """The data set that it was trained on, with its options where what it brings depends on them."""
        data = self._config.get("data")
        if isinstance(data, Mapping) and data.get("name") == self.data_name:
            return spec_of(data)
        return self.data_name

    def recipe(self) -> dict[str, Any]:
        """Returns what identifies the model: checkpoint, step, weight hash, VAE, whether it is compiled."""
        return {
            "checkpoint": str(self.checkpoint),
            "step": self.step,
            "weights": self.weights,
            "weights_sha256": self.weights_sha256,
            "vae": self.space.options.vae,
            "vae_identity": self.space.identity,
            "compile": self.is_compiled,
            **self._recipe_of_guide(),
        }

    def _recipe_of_guide(self) -> dict[str, Any]:
        """Returns what identifies the guide, where there is one."""
        if not isinstance(self.guide, CheckpointGenerator):
            return {}
        names = ("checkpoint", "step", "weights", "weights_sha256")
        return {f"guide_{name}": value for name, value in self.guide.recipe().items() if name in names}


def load_generator(
    checkpoint: Path | str | None = None,
    device: torch.device | str = "cpu",
    vae: str | None = None,
    weights: str = "ema",
    *,
    compiled: bool = False,
    called: str = "--checkpoint",
) -> CheckpointGenerator:
    """Returns the generator of a checkpoint.

    Args:
        checkpoint: A checkpoint folder or a run, whose newest one is read; None means the newest run.
        device: Where to run.
        vae: Folder of the VAE, where it is no longer where it was in training.
        weights: Which of the checkpoint's weights: `ema`, the raw `model`, or another of its model folders.
        compiled: Whether to compile the model: slow to start, then faster.
        called: What names the checkpoint, for messages.

    Raises:
        ValueError: If there is no checkpoint, or its VAE is missing or another one.
    """
    generator = None
    while generator is None:
        chosen = Path(newest_run(holding=LATENTS) if checkpoint is None else checkpoint)
        found = find_checkpoint(chosen, called)
        try:
            generator = CheckpointGenerator(found, device, vae, weights)
        except (ValueError, OSError) as error:
            if not found.exists():
                _check_goes_on(found, chosen, called, error)
            elif isinstance(error, DamagedCheckpoint):
                again = "give an earlier one by its folder, or train on from the newest whole one"
                raise DamagedCheckpoint(f"{error}: {again}") from error
            else:
                raise
    if compiled:
        generator.compile()
    return generator


def _check_goes_on(found: Path, chosen: Path, called: str, error: Exception) -> None:
    """Says that a checkpoint was removed while it was read, and that of its run the newest is read instead.

    Raises:
        ValueError: If the checkpoint itself was named.
    """
    removed = f"{found} was removed while it was read, as training.keep_last says"
    if found == chosen:
        raise ValueError(f"{called}: {removed}: give the run, whose newest checkpoint is read") from error
    logger.warning("%s: the newest checkpoint is read instead", removed)


def sampling_options(generator: CheckpointGenerator, given: Mapping[str, Any]) -> SamplingOptions:
    """Returns the checkpoint's sampling options with those that are given and not None, checked.

    Args:
        generator: Of the checkpoint.
        given: Fields of SamplingOptions, `sampler` by name, and `sampler_option`, the sampler's own options
            as `key=value` texts.

    Raises:
        ValueError: If an option, or the size for this model, is invalid, or the VAE is missing.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    name, texts = changes.pop("sampler", None), changes.pop("sampler_option", ())
    changes["sampler"] = change_sampler(generator.sampling.sampler, name, texts)
    options = replace(generator.sampling, **changes)
    device = generator.space.mean.device
    options = replace(options, precision=decided(options.precision, device))
    generator.check_batch_fits(options, 1)
    generator.check_guidance(options)
    warn_if_slow(options.precision, device)
    return options
