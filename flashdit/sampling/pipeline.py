"""FlashDiTPipeline: model, VAE, scheduler, class names and latent statistics as one diffusers pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flashdit.data.autoencoders import Autoencoder
from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.data.pixels import Pixels
from flashdit.flow.guidance import check_interval, guide
from flashdit.models.dit import FlashDiT
from flashdit.sampling.card import model_card
from flashdit.sampling.classes import class_ids
from flashdit.sampling.generator import check_latents, latent_shape, warn_of_guidance
from flashdit.shared.files import write_json
from flashdit.shared.pictures import check_pixels
from flashdit.shared.process import full_float32

SIGMA_ROUNDING = 1e-6
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
"""What makes diffusers' multistep schedulers follow the linear path."""
Label = int | str
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Any]]


class FlashDiTPipeline(DiffusionPipeline):
    """Classes in, images out: `pipe("golden retriever", guidance_scale=1.5).images[0]`.

    Args:
        transformer: The velocity model.
        vae: Its autoencoder; None where the model makes pixels.
        scheduler: One of diffusers' flow-matching schedulers; its sigma is 1 − t.
        id2label: Class names by number; None names classes by their numbers.
        latents_mean: Mean of the VAE's latents by channel; None means 0.
        latents_std: Their standard deviation by channel; None means 1.
        latents_multiplier: Factor on normalised latents.
        latents_space: `vae`, or `pixels` where the model makes pixels.
        recipe: What the model card states: checkpoint, sampling, metrics.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - diffusers' protocol
    _num_timesteps, _interrupt, _guidance_scale = 0, False, 1.0
    _callback_tensor_inputs = ("latents",)
    transformer: FlashDiT
    vae: ModelMixin | None
    scheduler: Any

    def __init__(
        self,
        transformer: FlashDiT,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        latents_multiplier: float = 1.0,
        latents_space: str = "vae",
        recipe: dict[str, Any] | None = None,
    ):
        super().__init__()
        given: Any = scheduler
        if is_flow_matching(given):  # what is made `from_config` of it follows the same path and shift
            given.register_to_config(**FLOW, flow_shift=given.config.get("shift", 1.0))
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        channels = transformer.config["in_channels"]
        mean, std = latents_mean or [0.0] * channels, latents_std or [1.0] * channels
        if not len(mean) == len(std) == channels:
            raise ValueError(f"latents need {channels} means and stds, got {len(mean)} and {len(std)}")
        self.register_to_config(
            id2label=id2label,
            latents_mean=latents_mean,
            latents_std=latents_std,
            latents_multiplier=latents_multiplier,
            latents_space=latents_space,
            recipe=recipe,
        )
        names = {int(i): name for i, name in (id2label or {}).items()}
        self.class_names = [names.get(i, str(i)) for i in range(transformer.num_classes)]
        self.vae_scale_factor = self._autoencoder().factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._mean, self._std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Label | Sequence[Label] | Tensor,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_prompt: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Returns an image for each class.

        Args:
            class_labels: A class's number or name, or several.
            guidance_scale: 1 is the conditional model, 0 the unconditional one.
            num_inference_steps: Updates of the scheduler.
            generator: Where the noise comes from; a list gives each image its own.
            height: In pixels, a multiple of the VAE's factor times the patch size; None is the training size.
            width: Likewise.
            guidance_interval: Times (low, high) in which guidance acts, 0 noise and 1 data.
            latents: The noise (B, C, H, W) itself.
            output_type: `pil`, `np`, `pt`, or `latent` for the normalised latents.
            return_dict: Whether to return an ImagePipelineOutput rather than a tuple.
            callback_on_step_end: Called as (pipe, step, timestep, {"latents": …}) after each step; the
                latents that it returns replace ours.
            callback_on_step_end_tensor_inputs: What the callback gets, of `latents`.
            num_images_per_prompt: Images of each class, next to one another.

        Raises:
            ValueError: If a class, a size, the interval or the scheduler is invalid.
        """
        check_interval(guidance_interval)
        check_scheduler(self.scheduler)
        model = self.transformer
        warn_of_guidance(model.num_classes, model.class_dropout_prob, guidance_scale)
        self._guidance_scale = guidance_scale
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can have {self._callback_tensor_inputs}, got {sorted(unknown)}")
        device = self._execution_device
        ids = self.label_ids(class_labels)
        if not ids or num_images_per_prompt < 1:
            raise ValueError(
                f"there must be an image to make, got {len(ids)} classes, {num_images_per_prompt=}"
            )
        labels = torch.tensor(ids, device=device).repeat_interleave(num_images_per_prompt)
        space = self._space(device)
        shape = (len(labels), *latent_shape(self.transformer, space, height, width))
        x = self._noise(shape, generator, latents, device)
        # Their sigmas are float32: a time that stands for an end of the interval may lie this far beyond it.
        interval = (
            max(0, guidance_interval[0] - SIGMA_ROUNDING),
            min(1, guidance_interval[1] + SIGMA_ROUNDING),
        )
        set_timesteps(self.scheduler, num_inference_steps, device)
        times = [1 - sigma for sigma in self.scheduler.sigmas.tolist()]
        takes = inspect.signature(self.scheduler.step).parameters
        draws = {"generator": generator} if "generator" in takes else {}
        self._num_timesteps, self._interrupt = len(self.scheduler.timesteps), False
        bar: Any = self.progress_bar
        for step, timestep in enumerate(bar(self.scheduler.timesteps)):
            if self._interrupt:
                break
            v = guide(self._velocity, labels, model.num_classes, self._guidance_scale, interval)
            slope = -v(x, times[step])  # theirs is dx/dσ
            x = self.scheduler.step(slope, timestep, x, return_dict=False, **draws)[0]
            if callback_on_step_end is not None:
                given = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                x = (callback_on_step_end(self, step, timestep, given) or {}).get("latents", x)
        check_latents(x, self.transformer, space, f"{guidance_scale=:g} and dtype={self.transformer.dtype}")
        images: Any = x
        if output_type != "latent":
            with full_float32():  # as the native sampler decodes
                pixels = space.pixels(x)
            check_pixels(pixels)
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call, as diffusers' own callbacks ask for them."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Of the call that a callback is in, which changes that of later steps by `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the last call; it does so by `pipe._interrupt = True`."""
        return self._interrupt

    def label_ids(self, class_labels: Label | Sequence[Any] | Tensor) -> list[int]:
        """Returns the numbers of classes given by number or name, in nested lists too.

        Raises:
            ValueError: If a class is out of range or unknown.
        """
        return class_ids(flattened(class_labels), self.class_names)

    def _noise(
        self,
        shape: tuple[int, ...],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        """Returns the starting noise in float32: drawn, or the one given."""
        if latents is None:
            if isinstance(generator, list) and len(generator) != shape[0]:
                raise ValueError(f"there must be a generator per image, got {len(generator)} for {shape[0]}")
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, torch.float32)

    def _velocity(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Returns the model's velocity in float32, whatever its own dtype."""
        return self.transformer(x.to(self.transformer.dtype), t, y).float()

    def _autoencoder(self) -> Autoencoder | Pixels:
        """Returns what decodes: the pipeline's `vae`, or nothing but the scale of pixels."""
        if self.config["latents_space"] == "pixels":
            return Pixels()
        if self.vae is None:
            raise ValueError("the pipeline of a model of latents requires its vae, got None")
        return Autoencoder(self.vae)

    def _space(self, device: torch.device) -> LatentSpace:
        """Returns the latent space, its statistics on a device."""
        options = LatentOptions(multiplier=self.config["latents_multiplier"])
        return LatentSpace(self._mean.to(device), self._std.to(device), options, self._autoencoder())

    def card(self) -> str:
        """Returns the model card: what this is, how it is used, what it scores."""
        return model_card(self.transformer.config, self.class_names, self.config["recipe"] or {})

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Writes the pipeline and its model card, README.md."""
        super().save_pretrained(str(save_directory), *arguments, **options)
        self._complete(Path(save_directory))

    def _upload_folder(self, working_dir: str | Path, *arguments: Any, **options: Any) -> Any:
        """Uploads a folder, our model card in place of the empty one that diffusers puts there."""
        self._complete(Path(working_dir))
        return super()._upload_folder(working_dir, *arguments, **options)

    def _complete(self, folder: Path) -> None:
        """Writes the card, and takes out of the scheduler's file what its own class would warn of."""
        (folder / "README.md").write_text(self.card())
        path = folder / "scheduler" / "scheduler_config.json"
        if is_flow_matching(self.scheduler):
            config = json.loads(path.read_text())
            kept = {key: value for key, value in config.items() if key not in (*FLOW, "flow_shift")}
            write_json(path, kept)


def flattened(labels: Any) -> list[Label]:
    """Returns labels given as one, or in tensors, arrays or sequences of any depth, one after another."""
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        return [labels]
    return [label for item in labels for label in flattened(item)]


def is_flow_matching(scheduler: Any) -> bool:
    """Returns whether a scheduler knows no other path than ours."""
    return type(scheduler).__name__.startswith("FlowMatch")


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError unless the scheduler follows the linear path with velocity prediction."""
    config: Mapping[str, Any] = scheduler.config
    takes = inspect.signature(type(scheduler).__init__).parameters  # its config keeps what it does not take
    follows = all(key in takes and config.get(key) == FLOW[key] for key in FLOW)
    if not (is_flow_matching(scheduler) or follows):
        raise ValueError(
            "the scheduler must be a FlowMatch… one, or one that takes use_flow_sigmas=True and "
            f"prediction_type='flow_prediction', got {type(scheduler).__name__}"
        )


def set_timesteps(scheduler: Any, steps: int, device: torch.device) -> None:
    """Gives the scheduler the native sampler's times, which it shifts; one that takes none has its own."""
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)


# One of the two writes to another package's names at import (the other registers the backbones with timm):
# DiffusionPipeline.from_pretrained finds the class that model_index.json names as an attribute of diffusers.
diffusers.FlashDiTPipeline = FlashDiTPipeline  # pyright: ignore[reportAttributeAccessIssue]
