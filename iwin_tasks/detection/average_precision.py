"""Average precision of boxes and masks by pycocotools, in the categories' own ids."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from iwin_tasks.detection.coco import Categories
from iwin_tasks.scenes.folders import run_lengths

BY_BOX, BY_MASK = "bbox", "segm"
"""What pycocotools calls the two ways to score."""
AT = {"ap50": 0.5, "ap75": 0.75}
AREAS = ("small", "medium", "large")


@dataclass(frozen=True, kw_only=True)
class AveragePrecision:
    """COCO's figures of one way to score, each from 0 to 1; None where no object is of the kind."""

    ap: float
    """Mean over IoU thresholds from 0.50 to 0.95, categories that have an object, and recall."""
    ap50: float
    ap75: float
    small: float | None
    """Of objects of less than 32² pixels."""
    medium: float | None
    """From there to 96²."""
    large: float | None
    per_class: dict[str, float | None]
    """AP by the category's name."""

    def __str__(self) -> str:
        sizes = "  ".join(
            f"{name} {'–' if value is None else f'{value:.1%}'}"
            for name, value in (("S", self.small), ("M", self.medium), ("L", self.large))
        )
        return f"AP {self.ap:.1%}  AP50 {self.ap50:.1%}  AP75 {self.ap75:.1%}  {sizes}"


def results_of(found: Mapping[str, Tensor], image_id: int, categories: Categories) -> list[dict[str, Any]]:
    """Returns the detections of one image as COCO's server takes them: ids and boxes as the data have them.

    Args:
        found: `boxes`, `scores`, `labels` and `masks` as `Detector` gives them.
        image_id: Of the data.
        categories: Of the data.
    """
    boxes = found["boxes"].float().cpu()
    sides = (boxes[:, 2:] - boxes[:, :2]).tolist()
    detections = zip(
        boxes[:, :2].tolist(),
        sides,
        found["scores"].tolist(),
        found["labels"].tolist(),
        found["masks"].cpu(),
        strict=True,
    )
    return [
        {
            "image_id": image_id,
            "category_id": categories.ids[label],
            "bbox": [*corner, *side],
            "score": score,
            "segmentation": run_lengths(mask),
        }
        for corner, side, score, label, mask in detections
    ]


def average_precision(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], kind: str
) -> AveragePrecision:
    """Returns the figures of results; without any result they are 0.

    Args:
        truth: As `ObjectImages.truth` gives it: crowds neither count as found nor as missed.
        results: As `results_of` gives them, of all images.
        kind: `bbox` or `segm`.

    Source: pycocotools' COCOeval at its own settings. Its `loadRes`, which raises IndexError without results,
        is not used.
    """
    # Copies, as pycocotools writes into them.
    objects = [dict(one) for one in truth["annotations"]]
    found = []
    for number, one in enumerate(results, start=1):
        mask = one["segmentation"]
        area = one["bbox"][2] * one["bbox"][3] if kind == BY_BOX else float(rle.area(mask))
        found.append({**one, "id": number, "iscrowd": 0, "area": area})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_indexed(truth, objects), _indexed(truth, found), cast(Any, kind))
        evaluation.evaluate()
        evaluation.accumulate()
    precision = cast(Any, evaluation.eval)["precision"][..., -1]  # (IoU, recall, category, area)
    thresholds = evaluation.params.iouThrs
    at = {name: _mean(precision[np.isclose(thresholds, iou), :, :, 0]) or 0.0 for name, iou in AT.items()}
    names = [one["name"] for one in sorted(truth["categories"], key=lambda one: one["id"])]
    return AveragePrecision(
        ap=_mean(precision[..., 0]) or 0.0,
        ap50=at["ap50"],
        ap75=at["ap75"],
        **{name: _mean(precision[..., place]) for place, name in enumerate(AREAS, start=1)},
        per_class={name: _mean(precision[:, :, place, 0]) for place, name in enumerate(names)},
    )


def _indexed(truth: Mapping[str, Any], annotations: list[dict[str, Any]]) -> COCO:
    """Returns pycocotools' index of annotations on the images of some truth."""
    coco = COCO()
    coco.dataset = cast(Any, {**truth, "annotations": annotations})
    coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float | None:
    """Returns the mean of precisions; None where none counts, which pycocotools has as −1."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else None
