"""Data sets by name, and what a data set brings beside its images."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor

from flashdit.data.colours import DecodedImage
from flashdit.data.images import crop_of_file, decode_image, find_images, parse_background
from flashdit.data.shards import LatentShards
from flashdit.shared.paths import check_length, printable
from flashdit.shared.registry import Buildable, Registry

DATASETS = Registry("data", "flashdit.data")
MOST_PIXELS = 8192  # of a side


class PixelSource(Protocol):
    """Images and labels; the trainer encodes them by the autoencoder, or trains on them as they are."""

    labels: Tensor
    class_names: list[str]
    mirrors: bool | None
    """Whether images are mirrored half the time; None: where they are encoded, but not as pixels."""

    def image(self, index: int) -> Tensor:
        """Returns one image, uint8 (3, H, W)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What a data set brings: the attribute `companions` of its class, or what it returns for its options."""

    autoencoder: Path | None = None
    """Folder or file of its autoencoder, which `latents.vae` gives by the data set's name."""
    reference: Callable[[], Any] | None = None
    """Returns real images held out, a `flashdit.evaluation.images.sources.Source`."""
    floor: Callable[[], Any] | None = None
    """Returns training images, likewise a Source: their scores are the floor of what samples can reach."""
    extractor: str | None = None
    """The extractor for scores against its reference; None means Inception."""
    num_images: int = 50_000
    """Samples that are scored against its reference unless another number is given."""


def companions_of(spec: str | None) -> Companions:
    """Returns what a data set brings; nothing where there is no such data set.

    Args:
        spec: Its name or, where other options than the defaults count, `{name: NAME, option: value}`.

    Raises:
        ValueError: If the options are invalid.
    """
    given = parse_spec(spec)
    if given["name"] is None or given["name"] not in DATASETS.names():
        return Companions()
    brought = getattr(cast(Buildable, DATASETS[given["name"]]).build, "companions", Companions())
    if isinstance(brought, Companions) and len(given) == 1:
        return brought
    options = DATASETS.options(given)[1]
    return brought if isinstance(brought, Companions) else brought(options)


def parse_spec(spec: str | None) -> dict[str, Any]:
    """Returns a data set's name and options of a text as `companions_of` takes it; a name of None for None.

    Raises:
        ValueError: If it is neither a name nor a name with options.
    """
    if spec is None or not (spec.startswith("{") and spec.endswith("}")):
        return {"name": spec}
    try:
        given = yaml.safe_load(spec)
    except yaml.YAMLError as error:
        said = str(error).partition("\n")[0]
        raise ValueError(f"a data set with options must be YAML, got {spec}: {said}") from error
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise ValueError(f"a data set with options must be {{name: NAME, option: value}}, got {spec}")
    return given


def spec_of(data: Mapping[str, Any]) -> str:
    """Returns a data set and its options as `companions_of` takes them.

    That is the name alone where nothing that it brings depends on its options, or all have their defaults.
    """
    name = data["name"]
    if name not in DATASETS.names():
        return name
    built = cast(Buildable, DATASETS[name])
    if isinstance(getattr(built.build, "companions", Companions()), Companions):
        return name
    options = fields(built.options_type)
    changed = {one.name: data[one.name] for one in options if data.get(one.name, one.default) != one.default}
    text = yaml.safe_dump({"name": name, **changed}, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.strip() if changed else name


class MemoryLatents:
    """Latents held in memory, as (N, C, H, W) and, where mirrored ones exist, as much again.

    Args:
        latents: VAE latents (N, C, H, W).
        mirrored: Latents of the mirrored images, or None.
        labels: (N,) int64.
        class_names: One per class.
    """

    def __init__(self, latents: Tensor, mirrored: Tensor | None, labels: Tensor, class_names: list[str]):
        self.latents, self.mirrored, self.labels = latents, mirrored, labels
        self.identity: Callable[[], dict[str, Any]] | None = None  # of what was encoded
        self.images: Callable[[Tensor, Tensor], Tensor] | None = None  # which that is: uint8 (B, 3, H, W)
        self.class_names: list[str] | None = class_names
        self.num_classes = len(class_names)
        self.mirrors = mirrored is not None
        self.shape = tuple(latents.shape[1:])

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Returns VAE latents (B, C, H, W) of rows (B,); `mirrored` (B,) tells which mirrors."""
        latents = self.latents[indices]
        if self.mirrored is not None:
            latents[mirrored] = self.mirrored[indices[mirrored]]
        return latents


def check_path(path: str) -> None:
    """Raises ValueError for a path of data that is too long, or empty and so the working directory."""
    if not path:
        raise ValueError("data.path must name a folder, got ''")
    check_length(path, "data.path")


@dataclass(kw_only=True)
class ShardsOptions:
    """Options of latent shards."""

    path: str
    """Folder of `latents_rankRR_shardSSS.safetensors`."""
    mirrors: bool = True
    """Whether a mirrored latent is taken half the time."""

    def __post_init__(self):
        check_path(self.path)


@DATASETS.register("shards", ShardsOptions)
class Shards(LatentShards):
    """Latent shards in LightningDiT's layout."""

    def __init__(self, options: ShardsOptions):
        super().__init__(Path(options.path))
        self.mirrors = options.mirrors


@dataclass(kw_only=True)
class ImagesOptions:
    """Options of an image folder."""

    path: str
    """Folder whose sub-folders are the classes; a folder without sub-folders is one class."""
    image_size: int = 256
    """Images are cropped to a square of this side, in pixels."""
    mirrors: bool | None = None
    """Whether images are mirrored half the time; null: where they are encoded, but not as pixels."""
    background: str = "white"
    """What transparent pixels show: a colour's name or `#rrggbb`."""

    def __post_init__(self):
        check_path(self.path)
        if self.image_size < 1:
            raise ValueError(f"data.image_size must be at least 1, got {self.image_size}")
        if self.image_size > MOST_PIXELS:
            raise ValueError(f"data.image_size must be at most {MOST_PIXELS}, got {self.image_size}")
        parse_background(self.background)


class CroppedImage(NamedTuple):
    """An image as it is trained on, and what is to be said of its file."""

    pixels: Tensor
    """uint8 (3, S, S)."""
    short_side: int
    """Of the file, in pixels."""
    transparent: bool
    """Whether the background shows through any pixel of the file."""
    animated: bool = False
    """Whether the file has frames after the one that is trained on."""


@DATASETS.register("images", ImagesOptions)
class ImageFolder:
    """Images in class sub-folders; an image is read when it is asked for.

    Args:
        options: Folder, side, mirroring and background.
        class_names: Of an earlier run or encoding, which keep their places; as `find_images` takes them.
        called: What messages call the folder.

    Attributes:
        found: What the walk found.
        names: Path of each image below the folder, with `/`.

    Raises:
        ValueError: If the folder holds no image, or a class has none.
    """

    def __init__(self, options: ImagesOptions, class_names: Sequence[str] = (), called: str = "data.path"):
        self.options, self.called = options, called
        self.found = find_images(Path(options.path), class_names, called)
        self.background = parse_background(options.background)
        self.image_size, self.mirrors = options.image_size, options.mirrors
        self.class_names = list(self.found.class_names)
        self.paths, self.num_bytes = list(self.found.paths), list(self.found.num_bytes)
        self.names = [path.relative_to(self.found.root).as_posix() for path in self.paths]
        self.labels = torch.tensor(self.found.labels)

    def decode(self, index: int) -> DecodedImage:
        """Returns one whole image.

        Raises:
            ValueError: If it cannot be read.
            FileNotFoundError: If the whole folder is gone, which nothing may take for unreadable images.
        """
        try:
            return decode_image(self.paths[index], self.background)
        except ValueError as error:
            if self.found.root.is_dir():
                raise
            rule = f"{self.called} must stay where it is while it is read"
            raise FileNotFoundError(f"{rule}, {printable(self.found.root)} is gone") from error

    def picture(self, index: int) -> Image.Image:
        """Returns one whole image, RGB."""
        return self.decode(index).picture

    def read(self, index: int) -> CroppedImage:
        """Returns one centre-cropped image."""
        picture, transparent, animated = self.decode(index)
        cropped = torch.from_numpy(np.array(crop_of_file(picture, self.image_size, self.paths[index])))
        return CroppedImage(cropped.permute(2, 0, 1), min(picture.size), transparent, animated)

    def identity(self) -> dict[str, Any]:
        """Returns what the images are known by: their classes, names below the folder and sizes."""
        return {"classes": self.class_names, "files": dict(zip(self.names, self.num_bytes, strict=True))}

    def image(self, index: int) -> Tensor:
        """Returns one centre-cropped image, uint8 (3, S, S)."""
        return self.read(index).pixels

    def subset(self, rows: Sequence[int]) -> ImageFolder:
        """Returns the same folder with only the images of some rows, in their order."""
        chosen = copy(self)
        chosen.paths, chosen.num_bytes, chosen.names = (
            [values[row] for row in rows] for values in (self.paths, self.num_bytes, self.names)
        )
        chosen.labels = self.labels[torch.tensor(rows, dtype=torch.long)]
        return chosen
