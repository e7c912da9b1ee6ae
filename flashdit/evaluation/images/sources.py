"""Where images come from: an npz, a folder or a generator, all as uint8 NCHW batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import iwin_core
from flashdit.data.images import report_images
from flashdit.data.sources import companions_of
from flashdit.evaluation.images.folders import FolderSource
from flashdit.evaluation.images.npz import NpzSource
from flashdit.evaluation.images.reading import label_mode
from flashdit.evaluation.images.recorded import check_samples, sample_recipe
from flashdit.sampling.folder import ARRAYS
from flashdit.sampling.records import guided_by
from flashdit.shared.files import code_sha256

TAKE_ROWS = 100  # images in memory beside those that are taken


class Source(Protocol):
    """A named, counted set of images that can be read again from its start, whole or in part.

    Attributes:
        name: What messages and reports call it.
        count: How many images there are.
        image_size: (h, w) in pixels.
    """

    name: str
    count: int
    image_size: tuple[int, int]

    @property
    def labels(self) -> Tensor | None:
        """The class of every image, (n,) int64; None where nobody knows."""
        ...

    # It may have `class_names` too, {label: name}; without, its labels are the other side's numbers.

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Yields images uint8 (b, 3, h, w), b at most batch_size, of ascending ids; None means all."""
        ...

    def identity(self) -> dict[str, Any]:
        """Returns what the content is known by: equal identities are equal images."""
        ...

    def recipe(self) -> dict[str, Any]:
        """Returns what a report says of where the images came from."""
        ...


class ReferenceSource(Source, Protocol):
    """Images that samples are compared with."""

    @property
    def sha256(self) -> str:
        """The hash by which two results have the same reference."""
        ...


class GeneratedSource:
    """Images that a generator draws while they are read; nothing touches the disk.

    Args:
        generator: What `flashdit.sampling.checkpoint.load_generator` returns.
        labels: (n,) int64 class of every image.
        options: The sampling options; they, and not the reader, set the batch size.
        mode: How the labels came about, for the report; None says whether they are balanced.
    """

    def __init__(self, generator: Any, labels: Tensor, options: Any, mode: str | None = None):
        self.generator, self.labels, self.options, self.mode = generator, labels, options, mode
        self.name, self.count = "samples", len(labels)
        self.image_size = generator.image_size(options)
        self.class_names = dict(enumerate(generator.class_names))

    def batches(self, batch_size: int, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Yields the images of ids, None for all.

        Every forward has one shape, set by the number of all images, and a last short one is filled up with
        images that are thrown away: so none depends on how many processes share the work.
        """
        ids = torch.arange(self.count) if ids is None else ids
        rounds = -(-self.count // self.options.batch_size)
        options = replace(self.options, batch_size=-(-self.count // rounds))
        filled = torch.cat([ids, ids[-1:].expand(-len(ids) % options.batch_size)])
        left = len(ids)
        for batch in self.generator.generate(self.labels, options, ids=filled) if left else ():
            yield batch.images[:left]
            left -= len(batch.images)

    def identity(self) -> dict[str, Any]:
        """Returns the hashes of weights, labels and code, and the sampling options."""
        space = self.generator.space
        sampling = {name: value for name, value in vars(self.options).items() if name != "batch_size"}
        recipe = {
            name: value
            for name, value in self.generator.recipe().items()
            if name not in ("checkpoint", "guide_checkpoint")
        }
        return {
            "kind": "generated",
            **recipe,
            "latents": [digest_of([space.mean.cpu(), space.std.cpu()]), str(space.options)],
            "sampling": sampling,
            "labels": digest_of([self.labels]),
            "code": code_digest(),
            "count": self.count,
        }

    def recipe(self) -> dict[str, Any]:
        """Returns the checkpoint, the sampling options and the cost of a sample."""
        nfe, recipe = self.generator.evaluations(self.options), self.generator.recipe()
        how = f"{self.options}{guided_by(recipe)}"
        return {
            "source": "checkpoint",
            **recipe,
            "sampling": vars(self.options),
            "nfe": nfe,
            "summary": f"{how}, {nfe or 'as many as needed'} model evaluations each",
            "labels": label_mode(self.labels, self.mode),
            "num_images": self.count,
        }


def take(source: Source, ids: Tensor) -> Tensor:
    """Returns the images uint8 (k, 3, h, w) of any ids (k,), in their order; k is 1 or more."""
    ascending, places = torch.unique(ids, return_inverse=True)
    return torch.cat(list(source.batches(TAKE_ROWS, ascending)))[places]


def open_source(
    path: Path, limit: int | None = None, background: str = "white", image_size: int | None = None
) -> NpzSource | FolderSource:
    """Returns the source that a path names: a file is an npz, a directory a folder of images.

    A folder of `flashdit sample` is read from its samples.npz or, where it was written as PNGs alone, from
    the samples among its pictures.

    Args:
        path: The npz or folder.
        limit: Read only so many images from the start; None means all.
        background: What transparent pixels of a folder's images show.
        image_size: Side that a folder's images are cropped to, and that those of an npz must have; None takes
            images as they are.

    Raises:
        ValueError: If it is neither, or what it holds is no image set.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"the image size must be at least 1, got {image_size}")
    if path.is_dir():
        recipe = sample_recipe(path)
        check_samples(path, recipe)
        if recipe.get("format") == "png" or not (path / ARRAYS).is_file():
            return FolderSource(path, limit, background, image_size)
        path = path / ARRAYS
        if not recipe:
            report_images(f"{path} is read, and no picture beside it", {})
    if not path.is_file():
        raise ValueError(f"--samples must be an existing npz or folder, got {path}")
    source = NpzSource(path, limit)
    check_image_size(source.image_size, image_size, str(path))
    return source


def check_image_size(found: tuple[int, int] | None, image_size: int | None, name: str) -> None:
    """Raises ValueError for images of another size that are in no folder, where they could be cropped."""
    if image_size is not None and found not in (None, (image_size, image_size)):
        assert found is not None
        raise ValueError(
            f"an image size crops images of folders alone, others must have it, got {found[1]}×{found[0]} in "
            f"{name} for {image_size}×{image_size}"
        )


def open_reference(spec: str, background: str = "white", image_size: int | None = None) -> ReferenceSource:
    """Returns the images that a spec names: those that a data set brings, or those of an npz or a folder.

    `background` and `image_size` are as in `open_source`.

    Raises:
        ValueError: If it is none of these.
    """
    brought = companions_of(spec).reference
    if brought is None:
        check_reference(spec)
        return open_source(Path(spec), None, background, image_size)
    source = brought()
    check_image_size(source.image_size, image_size, spec)
    return source


def check_reference(spec: str) -> None:
    """Raises ValueError unless a reference is a data set that brings one, or exists."""
    if companions_of(spec).reference is None and not Path(spec).exists():
        raise ValueError(
            f"a reference must be a data set that brings one, an existing npz or a folder, got {spec}"
        )


def digest_of(tensors: Sequence[Tensor]) -> str:
    """Returns the sha256 of tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@cache
def code_digest() -> str:
    """Returns the sha256 of the code: a changed sampler draws other images of the same weights."""
    return code_sha256([Path(__file__).parents[2], Path(iwin_core.__file__).parent])
