"""What does a COCO json say? Categories, images and objects, checked when the file is opened."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor

from flashdit.shared.paths import printable
from flashdit.shared.registry import counted, is_number

ENTRY_KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
"""What each entry of the json's lists must have."""
NUMBER_KEYS = ("id", "image_id", "category_id", "height", "width")
"""Keys of whole numbers."""
LEAST_SIDE = 1.0
"""Of a box within its image, in pixels; a smaller one is left out of training, as mmdetection does."""
LEAST_POINTS = 3  # of a polygon
FARTHEST = 10**6  # of a coordinate from 0, in pixels
FIRST_CODE, CODE_BITS, CODE_SIGN, CODE_MORE = 48, 5, 16, 32  # of the characters of run lengths
OBJECTS_NAMED = 10  # objects left out that are named one by one
CATEGORIES_NAMED = 5


@dataclass(frozen=True)
class Categories:
    """The ids of categories as the data have them, and their names; labels are places in them, from 0.

    Args:
        ids: Rising, with gaps where the data have some.
        names: One for each.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self.ids)

    @cached_property
    def labels(self) -> dict[int, int]:
        """The label of each id."""
        return {category: label for label, category in enumerate(self.ids)}

    def pairs(self) -> list[tuple[int, str]]:
        """Returns the id and the name of each."""
        return list(zip(self.ids, self.names, strict=True))

    def listed(self) -> list[dict[str, Any]]:
        """Returns them as a COCO json has them."""
        return [{"id": number, "name": name} for number, name in self.pairs()]


@dataclass(kw_only=True)
class CocoContent:
    """What a COCO json says of its images."""

    categories: Categories
    images: list[dict[str, Any]]
    """By rising id."""
    annotations: dict[int, list[dict[str, Any]]]
    """Of each image, by its id; crowds and what is left out of training are among them."""
    unusable: dict[int, str] = field(default_factory=dict)
    """Why an object is left out of training, by the annotation's id."""

    def usable(self, image: int) -> list[dict[str, Any]]:
        """Returns the annotations of an image that training takes: no crowd, a box and a mask."""
        return [
            one
            for one in self.annotations.get(image, [])
            if not one.get("iscrowd") and one["id"] not in self.unusable
        ]


def read_coco(path: Path) -> tuple[CocoContent, list[str]]:
    """Returns what a COCO json says, and in lines what is left out of training and what has no object.

    Objects without a box of at least 1 px within the image, or without a mask, are left out of training.

    Args:
        path: The json.

    Raises:
        ValueError: If it is no COCO json, an entry lacks what it must have or contradicts another, a mask is
            not of its image's size, or no object is left to train on.
    """
    called = printable(path)
    content = _checked_lists(path, called)
    ordered = sorted(content["categories"], key=lambda one: one["id"])
    categories = Categories(tuple(c["id"] for c in ordered), tuple(str(c["name"]) for c in ordered))
    images = {image["id"]: image for image in sorted(content["images"], key=lambda one: one["id"])}
    found = CocoContent(categories=categories, images=list(images.values()), annotations={})
    for annotation in content["annotations"]:
        where = f"annotation {annotation['id']} in {called}"
        if annotation["image_id"] not in images:
            raise ValueError(f"an annotation must be of an image of its file, got {where} of none")
        if annotation["category_id"] not in categories.labels:
            raise ValueError(
                f"an annotation must be of a category of its file, got {annotation['category_id']} in {where}"
            )
        image = images[annotation["image_id"]]
        reason = _fault(annotation, (image["height"], image["width"]), where)
        if reason and not annotation.get("iscrowd"):
            found.unusable[annotation["id"]] = reason
        found.annotations.setdefault(annotation["image_id"], []).append(annotation)
    counts = Counter(one["category_id"] for image in images for one in found.usable(image))
    _check_objects(found, counts, called)
    return found, _remarks(found, images, counts, called)


def _checked_lists(path: Path, called: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the json's three lists, each entry with its keys and an id of its own."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"annotations must be a COCO json, {called} is not: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in ENTRY_KEYS):
        raise ValueError(f"a COCO json must have the lists {', '.join(ENTRY_KEYS)}, {called} has not")
    for name, keys in ENTRY_KEYS.items():
        entries = content[name]
        for entry in entries:
            if not isinstance(entry, dict) or any(key not in entry for key in keys):
                raise ValueError(
                    f"each of a COCO json's {name} must have {', '.join(keys)}, "
                    f"got {_short(entry)} in {called}"
                )
            for key in (key for key in keys if key in NUMBER_KEYS):
                if not isinstance(entry[key], int) or isinstance(entry[key], bool):
                    raise ValueError(
                        f"{key} of each of a COCO json's {name} must be a whole number, "
                        f"got {entry[key]!r} in {called}"
                    )
        repeated = [one for one, times in Counter(entry["id"] for entry in entries).items() if times > 1]
        if repeated:
            raise ValueError(f"{name} must each have an id of their own, got {repeated[0]} twice in {called}")
    for image in content["images"]:
        if min(image["height"], image["width"]) < 1 or not isinstance(image["file_name"], str):
            raise ValueError(
                "an image must have a name, and height and width of at least 1, "
                f"got {_short(image)} in {called}"
            )
    names = [category["name"] for category in content["categories"]]
    strange = [name for name in names if not isinstance(name, str) or not name or names.count(name) > 1]
    if strange:
        raise ValueError(
            f"categories must each have a name of their own, got {_short(strange[0])} in {called}"
        )
    for name in ("images", "categories"):
        if not content[name]:
            raise ValueError(f"a COCO json must have {name}, {called} has none")
    return content


def _short(entry: Any) -> str:
    """Returns the beginning of an entry, for messages."""
    text = printable(repr(entry))
    return text if len(text) <= 80 else f"{text[:80]}…"


def _fault(annotation: Mapping[str, Any], size: tuple[int, int], where: str) -> str | None:
    """Returns why an object cannot be trained on; None where it can.

    Raises:
        ValueError: If its box is none, or its mask is of another size than the image.
    """
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_place, box))):
        raise ValueError(f"bbox must be four finite numbers, got {_short(box)} of {where}")
    area = annotation.get("area", 0)
    if not is_number(area) or not 0 <= area <= FARTHEST**2:
        raise ValueError(f"area must be a number of pixels, got {_short(area)} of {where}")
    if annotation.get("iscrowd", 0) not in (0, 1) or not isinstance(annotation.get("iscrowd", 0), int):
        raise ValueError(f"iscrowd must be 0 or 1, got {_short(annotation['iscrowd'])} of {where}")
    polygons = usable_polygons(annotation, size, where)
    if min(box[2:]) <= 0:
        return f"its box has no {'width' if box[2] <= 0 else 'height'}"
    x1, y1, x2, y2 = box_within(box, size)
    if x2 <= x1 or y2 <= y1:
        return "its box lies outside the image"
    if min(x2 - x1, y2 - y1) < LEAST_SIDE:
        return f"its box is less than {LEAST_SIDE:g} px wide or high"
    return None if polygons else "it has no mask"


def usable_polygons(annotation: Mapping[str, Any], size: tuple[int, int], where: str) -> Any:
    """Returns an annotation's mask: polygons of three points or more, or run lengths; empty if it has none.

    Args:
        annotation: Of the json.
        size: Height and width of its image.
        where: What names the annotation, for the message.

    Raises:
        ValueError: If run lengths are of another size.
    """
    mask = annotation.get("segmentation")
    if isinstance(mask, Mapping):
        counts = _run_lengths(mask.get("counts"))
        given = mask.get("size")
        if counts is None or given != list(size) or sum(counts) != size[0] * size[1]:
            raise ValueError(
                f"a mask must be of its image's height and width, {list(size)}, got {given} of {where}"
                if given != list(size)
                else f"a mask must have run lengths that cover its image, got others of {where}"
            )
        return mask
    polygons = mask if isinstance(mask, list) else []
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(_is_place, polygon)):
            raise ValueError(
                f"a polygon must be x and y of its points, finite numbers, got {_short(polygon)} of {where}"
            )
    return [polygon for polygon in polygons if len(polygon) >= 2 * LEAST_POINTS]


def _is_place(value: Any) -> bool:
    """Returns whether a value is a coordinate or a length in pixels."""
    return is_number(value) and abs(value) <= FARTHEST  # so is no NaN


def _run_lengths(counts: Any) -> list[int] | None:
    """Returns run lengths as numbers; None where they are none, or end in the midst of one.

    Args:
        counts: A list of them, or COCO's text: of each the difference to the one two before, from the fourth
            on, five bits a character, the lowest first.
    """
    if isinstance(counts, str):
        found: list[int] = []
        value = bits = 0
        for character in counts:
            code = ord(character) - FIRST_CODE
            if not 0 <= code < 2 * CODE_MORE:
                return None
            value |= (code % CODE_MORE) << bits
            bits += CODE_BITS
            if code < CODE_MORE:
                value -= (1 << bits) if code & CODE_SIGN else 0
                found.append(value + (found[-2] if len(found) > 2 else 0))
                value = bits = 0
        counts = found if not bits else None
    if not isinstance(counts, list) or any(not isinstance(n, int) or isinstance(n, bool) for n in counts):
        return None
    return counts if all(0 <= n <= FARTHEST**2 for n in counts) else None


def box_within(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """Returns x1, y1, x2, y2 within an image of height and width `size`, of x, y, width, height."""
    x, y, width, height = box
    return [
        min(max(x, 0.0), size[1]),
        min(max(y, 0.0), size[0]),
        min(max(x + width, 0.0), size[1]),
        min(max(y + height, 0.0), size[0]),
    ]


def mask_rle(annotation: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Returns an annotation's mask as compressed run lengths; without one those of no pixel.

    Args:
        annotation: Of a json that was checked.
        size: Height and width of its image.
    """
    mask = usable_polygons(annotation, size, f"annotation {annotation['id']}")
    if not mask:
        return cast(dict[str, Any], rle.encode(np.zeros(size, np.uint8, order="F")))
    if isinstance(mask, list):
        return cast(dict[str, Any], rle.merge(rle.frPyObjects(mask, *size)))
    if isinstance(mask["counts"], list):
        return cast(dict[str, Any], rle.frPyObjects(mask, *size))
    return dict(mask)


def object_tensors(
    annotations: Sequence[Mapping[str, Any]], categories: Categories, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns boxes (n, 4) float32 x1, y1, x2, y2, labels (n,) int64 and masks (n, H, W) uint8 of objects.

    Args:
        annotations: Of one image, as `CocoContent.usable` gives them.
        categories: Of the data.
        size: Height and width of the image.
    """
    boxes = torch.tensor([box_within(one["bbox"], size) for one in annotations]).float().reshape(-1, 4)
    labels = torch.tensor([categories.labels[one["category_id"]] for one in annotations], dtype=torch.int64)
    masks = [torch.from_numpy(rle.decode(cast(Any, mask_rle(one, size)))) for one in annotations]
    return boxes, labels, torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)


def _check_objects(found: CocoContent, counts: Counter[int], called: str) -> None:
    """Raises ValueError unless there is an object to train on; says what there is instead."""
    if counts:
        return
    annotations = [one for image in found.annotations.values() for one in image]
    crowds = sum(bool(one.get("iscrowd")) for one in annotations)
    if not annotations:
        why = "has no annotation"
    elif crowds == len(annotations):
        why = (
            f"has {counted(crowds, 'annotation')}, every one a crowd, which is neither trained on nor scored"
        )
    else:
        reasons = Counter(found.unusable.values())
        why = f"has none: of {counted(sum(reasons.values()), 'object')} {reasons.most_common(1)[0][0]}"
    raise ValueError(f"a COCO json must have an object that is no crowd, {called} {why}")


def _remarks(
    found: CocoContent, images: Mapping[int, dict[str, Any]], counts: Counter[int], called: str
) -> list[str]:
    """Returns in lines what is left out of training, and which categories have no object."""
    lines = []
    left_out = [
        f"annotation {one['id']} of {printable(images[image]['file_name'])}: {found.unusable[one['id']]}"
        for image, annotations in found.annotations.items()
        for one in annotations
        if one["id"] in found.unusable
    ]
    for line in left_out[:OBJECTS_NAMED]:
        lines.append(f"{called}: left out of training, {line}")
    if len(left_out) > OBJECTS_NAMED:
        lines.append(f"{called}: left out of training, {len(left_out) - OBJECTS_NAMED:,} objects more")
    empty = [printable(name) for number, name in found.categories.pairs() if not counts[number]]
    if empty:
        more = f" and {len(empty) - CATEGORIES_NAMED} more" if len(empty) > CATEGORIES_NAMED else ""
        lines.append(f"{called}: categories without an image: {', '.join(empty[:CATEGORIES_NAMED])}{more}")
    return lines
