"""Autoencoders of images by name: uint8 pixels to latents and back, whichever diffusers class does it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.models.auto_model import AutoModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.import_utils import is_transformers_available
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import Tensor

from flashdit.data.ldm import load_ldm_vae
from flashdit.data.pixels import Pixels
from flashdit.data.sources import companions_of
from flashdit.shared.paths import expanded
from flashdit.shared.runs import find_average, find_checkpoint, list_checkpoints, step_of

logger = logging.getLogger(__name__)
CONFIGS = ("config.json", "vae/config.json")
"""Of an autoencoder's and of a pipeline's repository."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
VARIANT = re.compile(r"diffusion_pytorch_model\.(?:safetensors\.index\.)?(\w+)(?:-\d+-of-\d+)?\.\w+")
PLAIN_WEIGHTS = [
    f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin", "safetensors.index.json")
]
PROBE_SIDES = 64, 256
"""Images of these sides measure an autoencoder's factor; the second one where the first is too small."""
WITH_PIXELS_FROM_0_TO_1 = ("AutoencoderRAE",)
"""The classes whose pixels are not from −1 to 1."""


class Autoencoder:
    """A frozen autoencoder of images; nothing else calls the classes of diffusers.

    `encode` of the module must give a posterior (`latent_dist`) or latents (`latent`, `latents`), and
    `decode` a `sample`. Its own `scaling_factor`, `shift_factor` and statistics are not applied: the
    latents are what `encode` gives, and `LatentSpace` normalises them.

    Args:
        module: The module of diffusers, or one of that kind.
    """

    def __init__(self, module: Any):
        self.module = module
        self.name = type(module).__name__
        self.image_side: int | None = getattr(module, "decoder_image_size", None)
        """The only side of its images, in pixels; None where it takes any multiple of `factor`."""
        self.offset = 0.0 if self.name in WITH_PIXELS_FROM_0_TO_1 else 1.0
        self.scale = 255 / (1 + self.offset)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that the module was made with."""
        return {key: value for key, value in self.module.config.items() if not key.startswith("_")}

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the configuration and the weights: what tells autoencoders apart."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _measured(self) -> tuple[int, int, bool]:
        """Channels, factor and whether there is a posterior, as the encoding of a black image shows them.

        Raises:
            ValueError: If the module is no autoencoder of images.
        """
        failure: Exception | None = None
        for side in PROBE_SIDES if self.image_side is None else (self.image_side,):
            try:
                return self._measure(side)
            except Exception as error:  # whatever a module of another kind raises
                failure = failure or error
        raise ValueError(
            "an autoencoder must encode images (B, 3, H, W) as latents (B, C, H/f, W/f) and decode those, "
            f"{self.name} does not: {first_line(failure)}"
        ) from failure

    @torch.no_grad()
    def _measure(self, side: int) -> tuple[int, int, bool]:
        """Returns channels, factor and whether there is a posterior, from one black image of a side."""
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            black = torch.zeros(1, 3, side, side, dtype=torch.uint8)
            output = self._encoded(black)
            latents = _latents_of(output, None)
            if latents.ndim != 4 or latents.shape[2] != latents.shape[3] or side % latents.shape[3]:
                raise ValueError(f"an image of side {side} has latents {tuple(latents.shape)}")
            pixels = self.decode(latents)
            if pixels.shape != black.shape:
                raise ValueError(f"an image {tuple(black.shape)} is decoded as {tuple(pixels.shape)}")
            if not torch.get_rng_state().equal(before):
                raise ValueError("it draws random numbers, so that a seed would not fix an image")
        return latents.shape[1], side // latents.shape[3], hasattr(output, "latent_dist")

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self._measured[0]

    @property
    def factor(self) -> int:
        """Pixels of a side that one latent stands for."""
        return self._measured[1]

    @property
    def has_posterior(self) -> bool:
        """Whether an image has a distribution of latents, of which samples can be drawn."""
        return self._measured[2]

    def to(self, device: torch.device | str) -> Autoencoder:
        """Moves the module to a device and returns the autoencoder."""
        self.module.to(device)
        return self

    def _encoded(self, images: Tensor) -> Any:
        """Returns what the module makes of images, uint8 (B, 3, H, W)."""
        return self.module.encode(images.to(self.module.device, self.module.dtype) / self.scale - self.offset)

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns the latents of images: uint8 (B, 3, H, W) → float32 (B, C, H/f, W/f).

        Args:
            images: Pixels.
            noise: Standard normal, (B, C, H/f, W/f): gives samples of the posterior; None gives its means.
        """
        return _latents_of(self._encoded(images), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Returns the images of latents: (B, C, H, W) → float32 (B, 3, H·f, W·f), about −1 to 1."""
        pixels = self.module.decode(latents.to(self.module.dtype)).sample.float()
        return pixels if self.offset else pixels * 2 - 1


def _latents_of(output: Any, noise: Tensor | None) -> Tensor:
    """Returns the latents (B, C, H, W), float32, of what the `encode` of a module of diffusers returns."""
    if not hasattr(output, "latent_dist"):
        return (output.latents if hasattr(output, "latents") else output.latent).float()
    posterior = output.latent_dist
    if noise is None:
        return posterior.mean.float()
    return posterior.mean.float() + posterior.std.float() * noise.to(posterior.mean.device)


def latent_size(autoencoder: Autoencoder | Pixels, height: int, width: int) -> tuple[int, int, int]:
    """Returns (C, H/f, W/f), the shape of the latents of images (3, H, W).

    Raises:
        ValueError: If the factor does not divide a side, or the autoencoder takes images of another side.
    """
    factor, only = autoencoder.factor, autoencoder.image_side
    if height % factor or width % factor:
        got = f"got {width}×{height}"
        raise ValueError(f"the image size must be a multiple of the VAE's {factor=}, {got}")
    if only is not None and (height, width) != (only, only):
        raise ValueError(f"{autoencoder.name} takes images of {only}×{only} alone, got {width}×{height}")
    return autoencoder.channels, height // factor, width // factor


def first_line(error: object) -> str:
    """Returns the first line of an error's text; errors of other packages have many."""
    return str(error).strip().partition("\n")[0]


class Place(NamedTuple):
    """Where diffusers finds an autoencoder."""

    source: str
    """A folder or a hub name."""
    subfolder: str | None
    """`vae` in a pipeline."""
    variant: str | None
    """Of the weights, such as `fp16`."""


def load_vae(name: str) -> Autoencoder:
    """Returns a frozen autoencoder in evaluation mode.

    Args:
        name: A data set that brings one, a folder of `save_pretrained` of an autoencoder or of a pipeline,
            such a hub name `OWNER/NAME`, a run of `flashdit autoencoder`, whose average is meant, or a file
            in LDM's layout, which is converted. A folder or hub name may end in `:VARIANT`; a folder that
            holds one variant alone needs no such ending.

    Raises:
        ValueError: If there is none under this name, or it is no autoencoder of images.
    """
    path = companions_of(name).autoencoder or _path(name)
    try:
        module = load_ldm_vae(path) if path.is_file() else _from_diffusers(_find(name, path))
    except OSError as error:
        raise ValueError(f"the autoencoder '{name}' must be readable: {first_line(error)}") from error
    autoencoder = Autoencoder(module.eval().requires_grad_(False))
    assert autoencoder.factor  # measured here, so that a module of another kind is refused at once
    return autoencoder


def _path(name: str) -> Path:
    """Returns a name as a path."""
    return Path(expanded(name))


def _without_variant(name: str) -> tuple[str, str | None]:
    """Returns a name and the variant that it ends in, `:VARIANT`; None where it ends in none."""
    found = re.fullmatch(r"(.+):(\w+)", name)
    return (name, None) if found is None or _path(name).exists() else (found[1], found[2])


def lasting_name(name: str | None) -> str | None:
    """Returns the name of an autoencoder as it is found from anywhere and at any time.

    An existing path is made absolute, and of a run of `flashdit autoencoder` the checkpoint that is meant now
    is named, since the run may be trained on.
    """
    if name is None or companions_of(name).autoencoder:
        return name
    bare, variant = _without_variant(name)
    path = _path(bare)
    if not path.exists():
        return name
    path = find_checkpoint(path, "the autoencoder") if list_checkpoints(path) else path
    return f"{path.absolute()}{f':{variant}' if variant else ''}"


def _find(name: str, path: Path) -> Place:
    """Returns where the autoencoder of a name lies, a path if there is one of that name.

    Raises:
        ValueError: If the name is neither that of a folder nor one that the hub can have.
    """
    variant = None
    if not path.exists():
        name, variant = _without_variant(name)
        path = _path(name)
    if path.is_dir():
        is_ours = bool(list_checkpoints(path)) or step_of(path) >= 0
        averages = [find_average(path, "the autoencoder")] if is_ours else []
        found = [folder for folder in (path, path / "vae", *averages) if (folder / "config.json").is_file()]
        if not found:
            raise ValueError(
                f"the folder of an autoencoder must hold config.json, vae/config.json or a run's checkpoint, "
                f"{path} has none"
            )
        return Place(str(found[0]), None, variant or only_variant(found[0]))
    if not HUB_NAME.fullmatch(name) or (path.parent.is_dir() and path.parent != Path()):
        raise ValueError(
            "latents.vae and --vae must be a data set that brings an autoencoder, a folder or a hub name "
            f"OWNER/NAME of one, or a file in LDM's layout, got '{name}', and there is no such path"
        )
    _check_within_reach(name)
    return Place(name, None if _is_in_root(name) else "vae", variant)


def _check_within_reach(name: str) -> None:
    """Raises ValueError at once where a hub repository is not kept here and the hub gives no answer.

    Its own client tries six times before it says that a file is missing.
    """
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in CONFIGS):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIGS[0]))
    except HfHubHTTPError:  # an answer, such as that there is no such file or repository
        return
    except Exception as error:  # whatever its client of HTTP raises
        raise ValueError(
            f"the autoencoder '{name}' must be a path or a hub name in reach: there is no such path, none in "
            f"the hub's cache, and the hub does not answer ({first_line(error)}); download it where there "
            "is a network, and give its folder"
        ) from error


def _is_in_root(name: str) -> bool:
    """Returns whether a hub repository is that of an autoencoder, else it is taken for a pipeline's."""
    try:
        AutoModel.load_config(name)
    except OSError as error:
        unreachable = isinstance(error.__context__, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        if unreachable or "file named" not in str(error):
            raise
        return False
    return True


def only_variant(folder: Path) -> str | None:
    """Returns the variant of the weights in a folder; None where there are plain ones.

    Raises:
        ValueError: If there are several variants and no plain weights.
    """
    names = [path.name for path in folder.iterdir()]
    variants = sorted({found[1] for name in names if (found := VARIANT.fullmatch(name))})
    if any(name in names for name in PLAIN_WEIGHTS) or not variants:
        return None
    if len(variants) > 1:
        raise ValueError(
            f"{folder} holds the variants {', '.join(variants)}: name one, as in {folder}:{variants[0]}"
        )
    return variants[0]


def _from_diffusers(place: Place) -> Any:
    """Returns the module of a folder or hub name, of the class that its config.json names.

    Raises:
        ValueError: If the class is no autoencoder, needs another package, or lacks weights.
    """
    source, subfolder, variant = place
    config: Any = AutoModel.load_config(source, subfolder=subfolder)
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin) and hasattr(kind, "decode")):
        raise ValueError(f"an autoencoder must be one of diffusers' classes, got {name} in {source}")
    if name == "AutoencoderRAE" and not is_transformers_available():
        raise ValueError(f"AutoencoderRAE requires the package transformers, {source} is one")
    given: dict[str, Any] = {
        "subfolder": subfolder,
        "torch_dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        module, found = _load(kind, source, variant, given)
    except OSError:
        raise
    except Exception as error:  # what a damaged file, or a configuration of other sizes, raises
        raise ValueError(f"the {name} in {source} must be readable: {first_line(error)}") from error
    if found["missing_keys"]:
        missing = found["missing_keys"]
        raise ValueError(f"the {name} in {source} lacks {len(missing)} weights, such as {sorted(missing)[0]}")
    return module


def _load(kind: Any, source: str, variant: str | None, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns a module and how it was loaded; fp16 weights stand in for plain ones that a hub name lacks."""
    try:
        return kind.from_pretrained(source, variant=variant, **given)
    except OSError as error:
        if variant or Path(source).exists() or "file named" not in str(error):
            raise
    loaded = kind.from_pretrained(source, variant="fp16", **given)
    logger.info("%s has no plain weights: its variant fp16 is used", source)
    return loaded
