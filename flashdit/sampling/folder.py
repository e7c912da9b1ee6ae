"""The folder of samples: filling it can stop at any time and go on later, by any number of processes.

OUT/
    recipe.json   everything the images were made with, written first; "finished" once all are there
    000000.png …  one for each sample, its recipe in the PNG's text
    grid.png      the first few of each class
    samples.npz   arr_0 uint8 (N, H, W, 3) and arr_1 labels, as ADM's evaluator reads them
    .parts/       which samples are done, and their pixels until samples.npz is whole; gone at the end
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flashdit.sampling.checkpoint import CheckpointGenerator
from flashdit.sampling.classes import FIRST_CLASSES, PER_CLASS
from flashdit.sampling.generator import SampleBatch
from flashdit.sampling.imagenet import shown_names
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.records import current_sampling
from flashdit.shared.files import mend, sync, write_atomically, write_json
from flashdit.shared.pictures import labelled_grid, png_text, rows_by_class, save_png
from flashdit.shared.registry import unknown

logger = logging.getLogger(__name__)
FORMATS = ("png", "npz", "both")
RECIPE, ARRAYS, GRID, PARTS_FOLDER = "recipe.json", "samples.npz", "grid.png", ".parts"
PNG_LEAST = 70
"""Bytes of the smallest PNG."""
MEASURED = ("nfe", "nfe_max")
CHANGES_NO_IMAGE = (*MEASURED, "checkpoint", "vae", "batch_size", "finished", "device", "class_names")


def make_recipe(
    generator: CheckpointGenerator,
    labels: Tensor,
    options: SamplingOptions,
    *,
    order: str = "balanced",
    form: str = "both",
) -> dict[str, Any]:
    """Returns all that images are made with.

    Args:
        generator: The model.
        labels: (N,) int64.
        options: How to sample.
        order: How the labels came about, `balanced` or `random`.
        form: One of `FORMATS`.
    """
    classes, names = list(dict.fromkeys(labels.tolist())), generator.class_names
    return {
        **generator.recipe(),
        "sampling": asdict(options),
        "nfe": options.nfe,
        "device": generator.space.mean.device.type,
        "labels": f"{order}{', in order' if order == 'balanced' else ''}",
        "classes": classes,
        "class_names": [names[label] if label < len(names) else "" for label in classes],
        "labels_sha256": hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "num_images": len(labels),
        "format": form,
        "title": f"step {generator.step}, {options}",
    }


def identity(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a recipe that decides the images."""
    kept = {key: value for key, value in recipe.items() if key not in CHANGES_NO_IMAGE}
    sampling = current_sampling(recipe["sampling"])
    sampling = {key: value for key, value in sampling.items() if key not in CHANGES_NO_IMAGE}
    return json.loads(json.dumps(kept | {"sampling": sampling}))


def digest(recipe: Mapping[str, Any], labels: Tensor) -> str:
    """Returns eight letters that tell recipes apart, for the name of a folder."""
    text = json.dumps([identity(recipe), labels.tolist()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def least_bytes(count: int, height: int, width: int, form: str) -> int:
    """Returns the bytes that so many images take on the disk at the least, while they are put together.

    Of an npz there are for a time the parts, the assembled pixels and the file itself.
    """
    pixels = 0 if form == "png" else 3 * 3 * height * width
    return count * (pixels + (0 if form == "npz" else PNG_LEAST))


class SampleFolder:
    """The images of one recipe on disk.

    Args:
        path: The folder; it need not exist.
        recipe: What the images are made with; it must hold `sampling` and `format`.
        labels: (N,) int64, the label of every sample.
        class_names: One per class.

    Raises:
        ValueError: If the folder holds something else, or the format is unknown.
    """

    def __init__(self, path: Path, recipe: dict[str, Any], labels: Tensor, class_names: Sequence[str]):
        if recipe["format"] not in FORMATS:
            raise unknown("format", recipe["format"], FORMATS)
        self.path, self.recipe, self.labels = path, recipe, labels
        self.class_names = class_names
        self.parts = path / PARTS_FOLDER
        self.has_png, self.has_npz = recipe["format"] != "npz", recipe["format"] != "png"
        self._check()

    def _check(self) -> None:
        """Refuses a folder of something else."""
        if not self.path.exists():
            return
        if not (self.path / RECIPE).is_file():
            # A kill at the very start leaves hidden files alone.
            if not self.path.is_dir() or any(file.name[0] != "." for file in self.path.iterdir()):
                raise ValueError(f"--output must be a new folder or one of the same samples, got {self.path}")
            return
        theirs, mine = identity(self.read_recipe()), identity(self.recipe)
        changed = sorted(key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key))
        if changed:
            raise ValueError(
                f"{self.path} holds samples of another recipe ({', '.join(changed)}): "
                "give another --output, or remove it"
            )

    @property
    def was_finished(self) -> bool:
        """Whether every image was there once."""
        return (self.path / RECIPE).is_file() and self.read_recipe()["finished"]

    @property
    def is_finished(self) -> bool:
        """Whether every image, the grid and the arrays are there."""
        files = [self.path / GRID, *([self.path / ARRAYS] if self.has_npz else [])]
        return self.was_finished and all(file.is_file() for file in files) and not len(self.missing())

    def read_recipe(self) -> dict[str, Any]:
        """Returns the recipe on disk.

        Raises:
            ValueError: If it is not one of ours.
        """
        try:
            return {"finished": False, "sampling": {}} | json.loads((self.path / RECIPE).read_text())
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path / RECIPE} must be of `flashdit sample`: {error}") from error

    def open(self) -> None:
        """Makes the folder, for one process to call; what is to be mended stays as it was finished."""
        if not self.was_finished:
            write_json(self.path / RECIPE, self.recipe | {"finished": False})
        self.parts.mkdir(exist_ok=True)
        for folder in (self.path, self.parts):
            mend(folder)

    def missing(self) -> Tensor:
        """Returns the numbers of the samples that are not there, in order; no pixels are read."""
        is_missing = torch.ones(len(self.labels), dtype=torch.bool)
        if self.was_finished and (self.has_png or (self.path / ARRAYS).is_file()):
            is_missing[:] = False
        for ids in self._recorded("ids"):
            is_missing[ids] = False
        if self.has_png and self.path.is_dir():
            with os.scandir(self.path) as files:
                there = {file.name for file in files if file.name.endswith(".png") and file.stat().st_size}
            is_missing |= torch.tensor([self._png(i).name not in there for i in range(len(is_missing))])
        return is_missing.nonzero()[:, 0]

    def add(self, batch: SampleBatch) -> None:
        """Writes a batch; a kill before the end of it leaves its samples missing."""
        if self.has_png:
            recipe = json.dumps(self.recipe)
            for i, image, label, nfe in zip(batch.ids, batch.images, batch.labels, batch.nfe, strict=True):
                about = {"sample": str(int(i)), "class": self._name(int(label)), "nfe": str(int(nfe))}
                save_png(image, self._png(int(i)), about | {"recipe": recipe})
                sync(self._png(int(i)))  # before the part says that it is there
        arrays: dict[str, Any] = {"ids": batch.ids.numpy(), "nfe": batch.nfe.numpy()}
        if self.has_npz:
            arrays["images"] = rearrange(batch.images, "b c h w -> b h w c").numpy()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # savez would put .npz after the temporary name
                np.savez(file, **arrays)

        write_atomically(self.parts / f"{int(batch.ids[0]):08d}.npz", write)

    def finish(self) -> None:
        """Puts the parts together once no sample is missing, for one process to call."""
        if not self.is_finished:
            left = len(self.missing())
            assert not left, f"{left} samples are missing in {self.path}"
            pixels = self._assemble() if self.has_npz else None
            self._write_grid(pixels)
            if pixels is not None and not (self.was_finished and (self.path / ARRAYS).is_file()):
                write_atomically(self.path / ARRAYS, self._write_arrays)
            write_json(self.path / RECIPE, self.recipe | self._measured() | {"finished": True})
        shutil.rmtree(self.parts, ignore_errors=True)

    def _measured(self) -> dict[str, Any]:
        """Returns the model evaluations that the samples took, on average and at most."""
        if self.was_finished:
            return {name: value for name, value in self.read_recipe().items() if name in MEASURED}
        evaluations = torch.cat([torch.from_numpy(nfe) for nfe in self._recorded("nfe")])
        mean = float(evaluations.double().mean())
        return {"nfe": int(mean) if mean.is_integer() else mean, "nfe_max": int(evaluations.max())}

    def _recorded(self, name: str) -> Iterator[np.ndarray]:
        """Yields one array of each part; the others are not read. A part that cannot be read is removed."""
        for path in sorted(self.parts.glob("[0-9]*.npz")):
            try:
                with np.load(path) as arrays:
                    yield arrays[name]
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                logger.warning("%s is damaged and its samples are made again: %s", path, error)
                path.unlink(missing_ok=True)

    def _assemble(self) -> np.ndarray:
        """Returns all pixels (N, H, W, 3) in order, in a memory-mapped file."""
        pixels = None
        for ids, images in self._images():
            if pixels is None:
                shape = (len(self.labels), *images.shape[1:])
                pixels = np.lib.format.open_memmap(self.parts / "pixels.npy", "w+", np.uint8, shape)
            pixels[ids] = images
        assert pixels is not None  # there is at least one sample
        pixels.flush()
        return pixels

    def _images(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Yields numbers and pixels of all samples: of the parts, and of files of samples finished before."""
        left = torch.ones(len(self.labels), dtype=torch.bool)
        if self.was_finished and (self.path / ARRAYS).is_file():
            with np.load(self.path / ARRAYS) as arrays:
                yield slice(None), arrays["arr_0"]
            left[:] = False
        for ids, images in zip(self._recorded("ids"), self._recorded("images"), strict=True):
            left[ids] = False
            yield ids, images
        for i in left.nonzero()[:, 0].tolist():
            yield [i], self._pixels(i)[None]

    def _write_arrays(self, temporary: Path) -> None:
        """Writes samples.npz from the assembled pixels, file to file; it holds no time, so bytes repeat."""
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with (
                (self.parts / "pixels.npy").open("rb") as pixels,
                archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
            ):
                shutil.copyfileobj(pixels, member, 2**24)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as member:
                np.lib.format.write_array(member, self.labels.numpy())

    def _write_grid(self, pixels: np.ndarray | None) -> None:
        """Writes grid.png: the first few images of the first few classes."""
        classes = self.labels.unique()[:FIRST_CLASSES]
        chosen = torch.cat([(self.labels == label).nonzero()[:PER_CLASS, 0] for label in classes])
        images = [self._pixels(i) if pixels is None else pixels[i] for i in chosen.tolist()]
        batch = rearrange(torch.from_numpy(np.stack(images)), "b h w c -> b c h w")
        shown = shown_names(self.class_names)
        names = [*shown, *[""] * (int(classes.max()) + 1 - len(shown))]
        rows = rows_by_class(batch, self.labels[chosen], names, PER_CLASS)
        grid = labelled_grid(rows, self.recipe.get("title", ""))
        info = png_text({"recipe": json.dumps(self.recipe)})
        write_atomically(self.path / GRID, lambda temporary: grid.save(temporary, format="png", pnginfo=info))

    def _pixels(self, i: int) -> np.ndarray:
        """Returns one sample (H, W, 3) from its PNG."""
        with Image.open(self._png(i)) as picture:
            return np.asarray(picture)

    def _png(self, i: int) -> Path:
        """Returns the PNG of a sample."""
        return self.path / f"{i:06d}.png"

    def _name(self, label: int) -> str:
        """Returns the name of a class; a model without classes has none."""
        return self.class_names[label] if label < len(self.class_names) else ""
