"""What did `flashdit sample` leave in a folder: which files are its samples, of which class is each?"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashdit.data.images import READERS
from flashdit.sampling.folder import ARRAYS, GRID, RECIPE
from flashdit.shared.runs import is_count, list_checkpoints

AGAIN = "the same `flashdit sample` completes it"


def sample_recipe(folder: Path) -> dict[str, Any]:
    """Returns the recipe that `flashdit sample` wrote in a folder, empty where there is none of it.

    Raises:
        ValueError: If there is one that cannot be read.
    """
    path = folder / RECIPE
    rule = f"{path} must be as `flashdit sample` wrote it"
    try:
        recipe = json.loads(path.read_text()) if path.is_file() else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{rule}: {error}") from error
    if not isinstance(recipe, dict) or not {"format", "num_images", "classes"} <= recipe.keys():
        _check_not_ours(folder)
        return {}
    classes, names = recipe["classes"], recipe.get("class_names")
    if not is_count(recipe["num_images"]):
        raise ValueError(f"{rule}: num_images must be a whole number")
    if not isinstance(classes, list) or not isinstance(names, list | None):
        raise ValueError(f"{rule}: classes and class_names must be lists")
    if names is not None and len(names) != len(classes):
        raise ValueError(f"{rule}: classes and class_names must be as many")
    return recipe


def _check_not_ours(folder: Path) -> None:
    """Raises ValueError for what `flashdit sample` wrote without its recipe: the grid would be a sample."""
    if all((folder / name).is_file() for name in (GRID, "000000.png")):
        raise ValueError(
            f"a folder of samples must have the {RECIPE} that `flashdit sample` wrote, {folder} has none: "
            f"bring it back, or take {GRID} out"
        )


def check_samples(folder: Path, recipe: dict[str, Any]) -> None:
    """Raises ValueError for a folder of samples that is not complete, or one that holds no images itself."""
    if recipe:
        if not recipe.get("finished", True):
            raise ValueError(f"a folder of samples must be finished, {folder} is not: {AGAIN}")
        if recipe["format"] != "png" and not (folder / ARRAYS).is_file():
            raise ValueError(f"a folder of samples must be complete, {folder} lacks {ARRAYS}: {AGAIN}")
        return
    if list_checkpoints(folder):
        raise ValueError(
            f"images must be an npz or a folder of images, got the run {folder}: give --checkpoint"
        )
    if (folder / ARRAYS).is_file():
        return
    within = sorted(entry.parent for entry in folder.glob(f"*/{RECIPE}") if sample_recipe(entry.parent))
    if within:
        names = ", ".join(path.name for path in within[:3])
        raise ValueError(f"{folder} holds folders of samples, give one of them: {names}")
    if folder.name == "samples" and list_checkpoints(folder.parent):
        raise ValueError(
            f"{folder} holds previews of training and no samples: draw some with `flashdit sample`"
        )


def sample_files(folder: Path, recipe: dict[str, Any]) -> list[Path]:
    """Returns the picture of each sample, in order; no other picture is one.

    Raises:
        ValueError: If one is missing.
    """
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    names = [f"{number:06d}.png" for number in range(recipe["num_images"])]
    missing = [name for name in names if not sizes.get(name)]
    if missing:
        others = f" and {len(missing) - 1:,} more" if missing[1:] else ""
        raise ValueError(
            f"a folder of samples must be complete, {folder} lacks {missing[0]}{others}: {AGAIN}"
        )
    return [folder / name for name in names]


def recorded_labels(files: list[Path], recipe: dict[str, Any]) -> Tensor | None:
    """Returns the label of each sample (n,) int64: each picture names its class, the recipe numbers them.

    None where the pictures name them otherwise than the recipe, as its checksum of the labels tells.
    """
    with ThreadPoolExecutor(READERS) as readers:
        names = list(readers.map(class_in_picture, files))
    order = list(dict.fromkeys(names))  # by first appearance, as the recipe lists classes
    if len(order) != len(recipe["classes"]):
        return None
    numbers = dict(zip(order, recipe["classes"], strict=True))
    labels = torch.tensor([numbers[name] for name in names])
    same = hashlib.sha256(labels.numpy().tobytes()).hexdigest() == recipe.get("labels_sha256")
    return labels if same else None


def class_in_picture(file: Path) -> str:
    """Returns the class that a sample's PNG names in its text; no pixels are read."""
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            return str(picture.info.get("class", ""))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"every image must be readable, {file} is not: {error}") from error


def names_in_recipe(recipe: dict[str, Any]) -> dict[int, str] | None:
    """Returns what the labels of a recipe are called; None where it does not say."""
    names = recipe.get("class_names")
    if names is None:
        return None
    return {label: name for label, name in zip(recipe["classes"], names, strict=True) if name}
