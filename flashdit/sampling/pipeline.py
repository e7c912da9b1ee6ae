"""FlashDiTPipeline: model, VAE, scheduler, class names and latent statistics as one diffusers pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from flashdit.data.autoencoders import Autoencoder
from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.data.pixels import Pixels
from flashdit.flow.guidance import VelocityModel, check_interval, guide
from flashdit.flow.mean_flow import along, check_guidance
from flashdit.models.dit import FlashDiT
from flashdit.sampling.card import CODE, CODE_TEXT, model_card
from flashdit.sampling.classes import class_ids, flattened
from flashdit.sampling.generator import check_latents, check_model_guidance, latent_shape
from flashdit.sampling.schedulers import (
    check_scheduler,
    is_flow_matching,
    remember_flow,
    set_timesteps,
    without_flow,
)
from flashdit.shared.files import write_json
from flashdit.shared.pictures import check_pixels
from flashdit.shared.process import full_float32
from flashdit.shared.registry import unknown

SIGMA_ROUNDING = 1e-6
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULTS: dict[str, Any] = {"num_inference_steps": 50, "guidance_scale": 1.0, "guidance_interval": (0.0, 1.0)}
DEFAULTS |= {"guidance_channels": None}
"""Of calls of a pipeline that stores none."""
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Any]]


def velocity_in_float32(model: FlashDiT) -> VelocityModel:
    """Returns a model whose velocity is in float32, whatever its own dtype."""
    return lambda x, t, y, **given: model(x.to(model.dtype), t, y, **given).float()


def check_guide(model: FlashDiT, guide: FlashDiT) -> None:
    """Raises ValueError for a guide that makes other latents, or knows another number of classes."""
    for name in ("in_channels", "sample_size", "num_classes"):
        wanted, got = model.config[name], guide.config[name]
        if wanted != got:
            raise ValueError(f"guide must have the transformer's {name}, got {got} for {wanted}")


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
        call_defaults: `num_inference_steps`, `guidance_scale`, `guidance_interval` and `guidance_channels` of
            calls that do not give them; what is missing is 50, 1, (0, 1) and None.
        guide: A worse model of the same data, which guidance leads away from; None is classifier-free
            guidance, away from the model without a class.
    """

    model_cpu_offload_seq = "transformer->guide->vae"
    _optional_components = ["vae", "guide"]  # noqa: RUF012 - diffusers' protocol
    _num_timesteps, _interrupt = 0, False
    _guidance_scale: float = 1.0
    _measured_vae: Autoencoder | None = None
    _callback_tensor_inputs = ("latents",)
    transformer: FlashDiT
    guide: FlashDiT | None
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
        call_defaults: dict[str, Any] | None = None,
        guide: FlashDiT | None = None,
    ):
        super().__init__()
        for name in call_defaults or {}:
            if name not in DEFAULTS:
                raise unknown("default of a call", name, DEFAULTS)
        self.defaults: dict[str, Any] = DEFAULTS | (call_defaults or {})
        if is_flow_matching(scheduler):
            remember_flow(scheduler)
        if guide is not None:
            check_guide(transformer, guide)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, guide=guide)
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
            call_defaults=call_defaults,
        )
        names = {int(i): name for i, name in (id2label or {}).items()}
        self.class_names = [names.get(i, str(i)) for i in range(transformer.num_classes)]
        self.vae_scale_factor = self._autoencoder().factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._mean, self._std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[Any] | Tensor,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_channels: int | None = None,
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
            guidance_scale: 1 is the conditional model, 0 the unconditional one, or the pipeline's guide; None
                is the stored one.
            num_inference_steps: Updates of the scheduler; None is the stored number.
            generator: Where the noise comes from; a list gives each image its own.
            height: In pixels, a multiple of the VAE's factor times the patch size; None is the training size.
            width: Likewise.
            guidance_interval: Times (low, high) in which guidance acts, 0 noise and 1 data; None is the
                stored interval.
            guidance_channels: How many leading channels are guided; None is the stored number, or else all.
            latents: The noise (B, C, H, W) itself.
            output_type: `pil`, `np`, `pt`, or `latent` for the normalised latents.
            return_dict: Whether to return an ImagePipelineOutput rather than a tuple.
            callback_on_step_end: Called as (pipe, step, timestep, {"latents": …}) after each step; the
                latents that it returns replace ours.
            callback_on_step_end_tensor_inputs: What the callback gets, of `latents`.
            num_images_per_prompt: Images of each class, next to one another.

        Raises:
            ValueError: If a class, a size, the interval, the output type or the scheduler is invalid.
        """
        stored = self.defaults
        scale: float = stored["guidance_scale"] if guidance_scale is None else guidance_scale
        steps: int = stored["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        interval = stored["guidance_interval"] if guidance_interval is None else guidance_interval
        if output_type not in OUTPUT_TYPES:
            raise unknown("output_type", output_type, OUTPUT_TYPES)
        channels = stored["guidance_channels"] if guidance_channels is None else guidance_channels
        check_interval(interval)
        check_scheduler(self.scheduler)
        inputs = self._callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
        model, device = self.transformer, self._execution_device
        kind = {"by_guide": self.guide is not None, "called": "guidance_channels"}
        check_model_guidance(model, scale, interval, channels, **kind)
        labels = self._labels(class_labels, num_images_per_prompt, device)
        space = self._space(device)
        x = self._noise((len(labels), *latent_shape(model, space, height, width)), generator, latents, device)
        set_timesteps(self.scheduler, steps, device)
        self._guidance_scale, self._interrupt = scale, False
        self._num_timesteps = len(self.scheduler.timesteps)

        def after(step: int, timestep: Tensor, x: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return x
            given = {name: x for name in inputs}
            return (callback_on_step_end(self, step, timestep, given) or {}).get("latents", x)

        x = self._denoise(x, labels, interval, channels, generator, after)
        check_latents(x, model, space, f"guidance_scale={scale:g} and dtype={model.dtype}")
        images: Any = x if output_type == "latent" else self._decode(x, space, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self,
        x: Tensor,
        labels: Tensor,
        interval: tuple[float, float],
        channels: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        after: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Returns the latents of noise by the scheduler's steps, going on with what `after` returns."""
        # Their sigmas are float32: a time that stands for an end of the interval may lie this far beyond it.
        wider = max(0, interval[0] - SIGMA_ROUNDING), min(1, interval[1] + SIGMA_ROUNDING)
        times = [1 - sigma for sigma in self.scheduler.sigmas.tolist()]
        takes = inspect.signature(self.scheduler.step).parameters
        draws = {"generator": generator} if "generator" in takes else {}
        main, null = velocity_in_float32(self.transformer), self.transformer.num_classes
        guiding = None if self.guide is None else velocity_in_float32(self.guide)
        most = self.transformer.config["most_guidance"]
        is_euler = isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler)
        bar: Any = self.progress_bar
        for step, timestep in enumerate(bar(self.scheduler.timesteps)):
            if self._interrupt:
                break
            if most is None:
                v = guide(main, labels, null, self._guidance_scale, wider, channels, guiding)
            else:
                check_guidance(self._guidance_scale, interval, most)  # a callback may have changed it
                v = along(main, labels, self._guidance_scale, times if is_euler else ())
            slope = -v(x, times[step])  # theirs is dx/dσ
            x = after(step, timestep, self.scheduler.step(slope, timestep, x, return_dict=False, **draws)[0])
        return x

    def _decode(self, latents: Tensor, space: LatentSpace, output_type: str) -> Any:
        """Returns the images of normalised latents."""
        with full_float32():  # as the native sampler decodes
            pixels = space.pixels(latents)
        check_pixels(pixels)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _callback_inputs(self, callback: Callback | None, inputs: Sequence[str]) -> Sequence[str]:
        """Returns the names of what a callback gets; those of diffusers' own kind name it themselves."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            inputs = callback.tensor_inputs
        unknown_inputs = sorted(set(inputs) - set(self._callback_tensor_inputs))
        if unknown_inputs:
            raise ValueError(f"callbacks can have {self._callback_tensor_inputs}, got {unknown_inputs}")
        return inputs

    def _labels(self, class_labels: Any, images_of_each: int, device: torch.device) -> Tensor:
        """Returns the label of each image (B,)."""
        ids = self.label_ids(class_labels)
        if not ids or images_of_each < 1:
            count = f"{len(ids)} classes, num_images_per_prompt={images_of_each}"
            raise ValueError(f"there must be an image to make, got {count}")
        return torch.tensor(ids, device=device).repeat_interleave(images_of_each)

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

    def label_ids(self, class_labels: int | str | Sequence[Any] | Tensor) -> list[int]:
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

    def _autoencoder(self) -> Autoencoder | Pixels:
        """Returns what decodes: the pipeline's `vae`, or nothing but the scale of pixels."""
        if self.config["latents_space"] == "pixels":
            return Pixels()
        if self.vae is None:
            raise ValueError("the pipeline of a model of latents requires its vae, got None")
        # Measuring encodes an image: once for each module, since offloaded ones cannot do it.
        if self._measured_vae is None or self._measured_vae.module is not self.vae:
            self._measured_vae = Autoencoder(self.vae)
        return self._measured_vae

    def _space(self, device: torch.device) -> LatentSpace:
        """Returns the latent space, its statistics on a device."""
        options = LatentOptions(multiplier=self.config["latents_multiplier"])
        return LatentSpace(self._mean.to(device), self._std.to(device), options, self._autoencoder())

    def card(self) -> str:
        """Returns the model card: what this is, how it is used, what it scores."""
        recipe = self.config["recipe"] or {}
        return model_card(self.transformer.config, self.class_names, recipe, self.config["latents_space"])

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """Writes the pipeline, its model card README.md and its `pipeline.py`."""
        super().save_pretrained(str(save_directory), *arguments, **options)
        self._complete(Path(save_directory))

    def _upload_folder(self, working_dir: str | Path, *arguments: Any, **options: Any) -> Any:
        """Uploads a folder, our model card in place of the empty one that diffusers puts there."""
        self._complete(Path(working_dir))
        return super()._upload_folder(working_dir, *arguments, **options)

    def _complete(self, folder: Path) -> None:
        """Writes card and code, and makes the other files such as diffusers reads from a hub, unwarned.

        Names of folders on this machine are left out of them.
        """
        (folder / "README.md").write_text(self.card(), encoding="utf-8")
        (folder / CODE).write_text(CODE_TEXT)
        for path in (folder / self.config_name, *folder.glob("*/*config.json")):
            content = json.loads(path.read_text())
            content.pop("_name_or_path", None)
            for name in ("transformer", "guide"):
                if content.get(name, [None])[0] == FlashDiT.__module__:  # refused in a repository
                    content[name] = ["diffusers", FlashDiT.__name__]
            if content.get("guide") == [None, None]:
                del content["guide"]
            if path.parent.name == "scheduler" and is_flow_matching(self.scheduler):
                content = without_flow(content)
            write_json(path, content)


# One of the two writes to another package's names at import (the other registers the backbones with timm).
# A model_index.json can name classes of few packages, diffusers among them: thus the model's is found, and
# the pipeline's where no `custom_pipeline` is given.
for _kind in (FlashDiT, FlashDiTPipeline):
    setattr(diffusers, _kind.__name__, _kind)
