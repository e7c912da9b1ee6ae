"""Scenes as the folders that COCO and ADE20K come in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from flashdit.digits.images import DIGIT_NAMES
from flashdit.shared.files import write_json
from flashdit.shared.pictures import save_png
from iwin_tasks.scenes.drawing import Scene, SceneOptions, draw_scene

COCO_SPLITS = {"train": "train2017", "held-out": "val2017"}
ADE20K_SPLITS = {"train": "training", "held-out": "validation"}
FIRST_CATEGORY = 1  # COCO's ids: digit + 1
ADE20K_OFFSET = 1
"""What ADE20K's label files add to a class, as 0 is none there."""


def write_coco(folder: Path, options: SceneOptions, split: str) -> Path:
    """Writes a split's scenes as COCO has them, and returns the path of the json.

    Images are `FOLDER/{train2017,val2017}/*.png`, and the json `FOLDER/annotations/instances_*.json`: boxes
    as x, y, width, height, masks as run lengths. Category ids are the digits + 1.

    Args:
        folder: Made where it is not there.
        options: Of the scenes; their `train_images` or `held_out_images` are written.
        split: `train` or `held-out`.

    Raises:
        ValueError: If the split is unknown.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    name = COCO_SPLITS.get(split, split)
    for index, scene in _scenes(options, split):
        file = f"{index:012d}.png"
        _make(folder / name)
        save_png(scene.image, folder / name / file)
        height, width = scene.label_map.shape
        images.append({"id": index, "file_name": file, "height": height, "width": width})
        annotations += scene_annotations(scene, index, len(annotations) + 1)
    categories = [{"id": i, "name": name} for i, name in enumerate(DIGIT_NAMES, start=FIRST_CATEGORY)]
    path = _make(folder / "annotations") / f"instances_{name}.json"
    write_json(path, {"images": images, "annotations": annotations, "categories": categories})
    return path


def scene_annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """Returns a scene's digits as COCO's annotations.

    Args:
        scene: The scene.
        image_id: Of its image.
        first_id: Of the first digit; the others follow.
    """
    found = zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks, strict=True)
    return [
        {
            "id": first_id + place,
            "image_id": image_id,
            "category_id": label + FIRST_CATEGORY,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": int(mask.sum()),
            "segmentation": run_lengths(mask),
            "iscrowd": 0,
        }
        for place, ((x1, y1, x2, y2), label, mask) in enumerate(found)
    ]


def write_ade20k(folder: Path, options: SceneOptions, split: str) -> None:
    """Writes a split's scenes as ADE20K has them: images/{training,validation}, annotations/ likewise.

    Label files hold class + 1, the background's class being 0: as in ADE20K nothing is 0 but what does not
    count, and here all pixels do.

    Args:
        folder: Made where it is not there.
        options: Of the scenes; their `train_images` or `held_out_images` are written.
        split: `train` or `held-out`.

    Raises:
        ValueError: If the split is unknown.
    """
    for index, scene in _scenes(options, split):
        images, labels = (_make(folder / kind / ADE20K_SPLITS[split]) for kind in ("images", "annotations"))
        save_png(scene.image, images / f"{index:08d}.png")
        values = (scene.label_map + ADE20K_OFFSET).numpy()
        Image.fromarray(values).save(labels / f"{index:08d}.png")


def run_lengths(mask: Tensor) -> dict[str, Any]:
    """Returns a mask (H, W) bool as COCO's compressed run lengths, which json can hold."""
    # Its stubs say that counts are text, which they are not yet.
    found = cast(dict[str, Any], rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8))))
    return {"size": list(found["size"]), "counts": found["counts"].decode()}


def _scenes(options: SceneOptions, split: str) -> Iterator[tuple[int, Scene]]:
    """Yields the scenes of a split and their indices."""
    count = options.train_images if split == "train" else options.held_out_images
    return ((index, draw_scene(options, split, index)) for index in range(count))


def _make(folder: Path) -> Path:
    """Returns a folder, made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
