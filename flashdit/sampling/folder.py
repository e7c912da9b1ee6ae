"""The folder of samples: filling it can stop at any time and go on later, by any number of processes.

OUT/
    recipe.json   everything the images were made with, written first; "finished" once all are there
    000000.png …  one for each sample, its recipe in the PNG's text
    grid.png      the first few of each class
    samples.npz   arr_0 uint8 (N, H, W, 3) and arr_1 labels, as ADM's evaluator reads them
    .parts/       which samples are done, and their pixels until samples.npz is whole; gone at the end
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flashdit.sampling.classes import FIRST_CLASSES, PER_CLASS
from flashdit.sampling.damage import is_whole_npz, is_whole_png, is_whole_samples
from flashdit.sampling.generator import SampleBatch
from flashdit.sampling.imagenet import shown_names
from flashdit.sampling.recipe import MEASURED, identity, read_recipe
from flashdit.shared.files import mend, sync, write_atomically, write_json
from flashdit.shared.pictures import labelled_grid, png_text, rows_by_class, save_png
from flashdit.shared.registry import unknown

logger = logging.getLogger(__name__)
FORMATS = ("png", "npz", "both")
RECIPE, ARRAYS, GRID, PARTS_FOLDER = "recipe.json", "samples.npz", "grid.png", ".parts"
PIXELS = "pixels.npy"
"""In the parts' folder, while samples.npz is put together."""
PNG_LEAST = 70
"""Bytes of the smallest PNG."""
NAMED_FILES = 3  # damaged ones that a message names


def least_bytes(count: int, height: int, width: int, form: str) -> int:
    """Returns the bytes that so many images take on the disk at the least, while they are put together.

    Of an npz there are for a time the parts, the assembled pixels and the file itself.
    """
    pixels = 0 if form == "png" else 3 * 3 * height * width
    return count * (pixels + (0 if form == "npz" else PNG_LEAST))


def take_room(path: Path) -> None:
    """Takes the room of a file on the disk: writing to its map would kill the process on a full one."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


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
        self.check()

    def check(self) -> None:
        """Refuses a folder of something else; one in which no sample was finished is free."""
        if not self.path.exists():
            return
        is_folder = self.path.is_dir()
        held = {file.name for file in self.path.iterdir() if file.name[0] != "."} if is_folder else {""}
        if RECIPE not in held:
            if held:
                raise ValueError(f"--output must be a new folder or one of the same samples, got {self.path}")
            return
        found = self.read_recipe()
        if not found["finished"] and held == {RECIPE} and not any(self._part_files()):
            return
        theirs, mine = identity(found), identity(self.recipe)
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
        return read_recipe(self.path / RECIPE)

    def open(self) -> None:
        """Makes the folder, for one process to call; what is to be mended stays as it was finished."""
        if not self.was_finished:
            write_json(self.path / RECIPE, self.recipe | {"finished": False})
        self.parts.mkdir(exist_ok=True)
        for folder in (self.path, self.parts):
            mend(folder)

    def remove_damaged(self) -> None:
        """Removes files that are not as they were written, so that they are made again; says which.

        Every file is read, no pixel is decoded. For one process to call.
        """
        arrays, parts = self.path / ARRAYS, self._part_files()
        pictures = [self.path / GRID, *(map(self._png, range(len(self.labels))) if self.has_png else ())]
        damaged = [path for path in pictures if path.is_file() and not is_whole_png(path)]
        if arrays.is_file() and not is_whole_samples(arrays, self.labels.numpy()):
            damaged.append(arrays)
        damaged += [path for path in parts if not is_whole_npz(path, self._part_arrays)]
        for path in damaged:
            path.unlink()
        if damaged:
            names = ", ".join(str(path.relative_to(self.path)) for path in damaged[:NAMED_FILES])
            others = f" and {len(damaged) - NAMED_FILES:,} more" if damaged[NAMED_FILES:] else ""
            logger.warning("%s: damaged files are made again: %s%s", self.path, names, others)

    def missing(self) -> Tensor:
        """Returns the numbers of the samples that are not there, in order; no pixels are read."""
        is_missing = torch.ones(len(self.labels), dtype=torch.bool)
        if self.was_finished and (self.has_png or (self.path / ARRAYS).is_file()):
            is_missing[:] = False
        for ids in self._recorded("ids"):
            is_missing[ids] = False
        if self.has_png and self.path.is_dir():
            with os.scandir(self.path) as files:
                there = {file.name for file in files if file.name.endswith(".png") and file.is_file()}
            is_missing |= torch.tensor([self._png(i).name not in there for i in range(len(is_missing))])
        return is_missing.nonzero()[:, 0]

    def add(self, batch: SampleBatch) -> None:
        """Writes a batch, whole or not at all; a kill before the end of it leaves its samples missing."""
        try:
            self._write_pictures(batch)
            self._write_part(batch)
        except BaseException:
            for i in batch.ids.tolist() if self.has_png else ():
                self._png(i).unlink(missing_ok=True)
            raise

    def _write_pictures(self, batch: SampleBatch) -> None:
        """Writes the PNGs of a batch, where there are any."""
        recipe = json.dumps(self.recipe)
        rows = zip(batch.ids, batch.images, batch.labels, batch.nfe, strict=True)
        for i, image, label, nfe in rows if self.has_png else ():
            about = {"sample": str(int(i)), "class": self._name(int(label)), "nfe": str(int(nfe))}
            save_png(image, self._png(int(i)), about | {"recipe": recipe})
            sync(self._png(int(i)))  # before the part says that it is there

    def _write_part(self, batch: SampleBatch) -> None:
        """Writes which samples a batch holds, and their pixels where samples.npz is to have them."""
        pixels = rearrange(batch.images, "b c h w -> b h w c")
        columns = {"ids": batch.ids, "nfe": batch.nfe, "images": pixels}
        arrays: dict[str, Any] = {name: columns[name].numpy() for name in self._part_arrays}

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
        mend(self.parts)
        for path in (*self._part_files(), self.parts / PIXELS):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # it holds a file of somebody else's
            self.parts.rmdir()

    def _measured(self) -> dict[str, Any]:
        """Returns the model evaluations that the samples took, on average and at most."""
        if self.was_finished:
            return {name: value for name, value in self.read_recipe().items() if name in MEASURED}
        evaluations = torch.cat([torch.from_numpy(nfe) for nfe in self._recorded("nfe")])
        mean = float(evaluations.double().mean())
        return {"nfe": int(mean) if mean.is_integer() else mean, "nfe_max": int(evaluations.max())}

    @property
    def _part_arrays(self) -> tuple[str, ...]:
        """Names of the arrays of a part."""
        return ("ids", "nfe", *(["images"] if self.has_npz else []))

    def _part_files(self) -> list[Path]:
        """Returns the files of the parts, in order."""
        return sorted(self.parts.glob("[0-9]*.npz"))

    def _recorded(self, name: str) -> Iterator[np.ndarray]:
        """Yields one array of each part; the others are not read."""
        for path in self._part_files():
            with np.load(path) as arrays:
                yield arrays[name]

    def _assemble(self) -> np.ndarray:
        """Returns all pixels (N, H, W, 3) in order, in a memory-mapped file."""
        pixels = None
        for ids, images in self._images():
            if pixels is None:
                shape = (len(self.labels), *images.shape[1:])
                pixels = np.lib.format.open_memmap(self.parts / PIXELS, "w+", np.uint8, shape)
                take_room(self.parts / PIXELS)
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
                (self.parts / PIXELS).open("rb") as pixels,
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
