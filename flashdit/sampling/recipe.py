"""The recipe of samples: all that images are made with, and what of it decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from flashdit.sampling.checkpoint import CheckpointGenerator
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.records import current_sampling, guided_by
from flashdit.shared.files import read_checked_json
from flashdit.shared.registry import check_type

MEASURED = ("nfe", "nfe_max")
FOLDERS = ("checkpoint", "guide_checkpoint", "vae")
CHANGES_NO_IMAGE = (*MEASURED, *FOLDERS, "batch_size", "finished", "device", "class_names")


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
        "nfe": generator.evaluations(options),
        "device": generator.space.mean.device.type,
        "labels": f"{order}{', in order' if order == 'balanced' else ''}",
        "classes": classes,
        "class_names": [names[label] if label < len(names) else "" for label in classes],
        "labels_sha256": hashlib.sha256(labels.numpy().tobytes()).hexdigest(),
        "num_images": len(labels),
        "format": form,
        "title": f"step {generator.step}, {options}{guided_by(generator.recipe())}",
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


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns the recipe that a folder of samples holds.

    Raises:
        ValueError: If it is not one of ours.
    """
    try:
        recipe = {"finished": False, "sampling": {}} | read_checked_json(path)
        check_type("finished", recipe["finished"], bool)
        check_type("sampling", recipe["sampling"], Mapping)
        if recipe["finished"]:
            check_type("nfe", recipe.get("nfe"), float)
        identity(recipe)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} must be of `flashdit sample`: {error}") from error
    return recipe
