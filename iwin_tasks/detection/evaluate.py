"""A detector on held-out images: its results and their average precision, over any number of processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from flashdit.shared.progress import progress_bar
from flashdit.shared.readers import read_batches
from iwin_tasks.detection.average_precision import (
    BY_BOX,
    BY_MASK,
    AveragePrecision,
    average_precision,
    results_of,
)
from iwin_tasks.detection.data import ObjectImages, WholeImages
from iwin_tasks.detection.detector import Detector


class DetectionScores(NamedTuple):
    """What an evaluation found."""

    box: AveragePrecision
    mask: AveragePrecision
    num_images: int
    images_per_s: float
    """Images of all processes by the time that reading, the model and scoring took."""

    def __str__(self) -> str:
        return (
            f"box {self.box}\nmask {self.mask}\n{self.num_images:,} images  {self.images_per_s:,.1f} images/s"
        )

    def scores(self) -> dict[str, float]:
        """Returns what a run records."""
        return {
            f"ema_{kind}_{name}": getattr(part, name)
            for kind, part in (("box", self.box), ("mask", self.mask))
            for name in ("ap", "ap50", "ap75")
        }


class Detections(NamedTuple):
    """The scores of a detector, and the results that they are of."""

    scores: DetectionScores
    results: list[dict[str, Any]]
    """Of all images, as COCO's server takes them; on the main process alone."""


def keep_images(items: Sequence[Any]) -> list[Any]:
    """Returns the items of a batch as they are, since images differ in size."""
    return list(items)


@torch.inference_mode()
def detect_rows(
    model: Detector,
    images: ObjectImages,
    rows: range,
    batch_size: int,
    accelerator: Any,
    workers: int = 0,
    show: bool = True,
) -> list[dict[str, Any]]:
    """Returns the results of some rows.

    Args:
        model: In evaluation mode, on the accelerator's device.
        images: The held-out split.
        rows: Which of them.
        batch_size: Images that are read at a time.
        accelerator: Whose device and precision are used.
        workers: Processes that read images.
        show: Whether there is a progress bar.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    read = read_batches(
        WholeImages(images),
        workers,
        batch_sampler=batches,
        collate_fn=keep_images,
        generator=torch.Generator(),  # its own: the global one stays where a resume would find it
    )
    results = []
    for batch in progress_bar(
        read, total=len(batches), desc="evaluate", unit="batch", disable=not show, leave=False
    ):
        found = find_objects(model, [image for _, image in batch], accelerator)
        for (row, _), one in zip(batch, found, strict=True):
            results += results_of(one, images.image_ids[row], images.categories)
    return results


def find_objects(
    model: Detector, images: Sequence[Tensor], accelerator: Any = None
) -> list[Mapping[str, Tensor]]:
    """Returns what a detector in evaluation mode finds on images (3, H, W) in 0 to 1.

    Only images of one size share a canvas: what an Iwin backbone sees of an image depends on the size of it.

    Args:
        model: The detector.
        images: Of any sizes.
        accelerator: Whose device and precision are used; None means the CPU and float32.
    """
    device = accelerator.device if accelerator else torch.device("cpu")
    sizes = [tuple(image.shape) for image in images]
    found: list[Mapping[str, Tensor]] = [{}] * len(images)
    for size in dict.fromkeys(sizes):
        places = [place for place, one in enumerate(sizes) if one == size]
        with accelerator.autocast() if accelerator else nullcontext():
            together = model([images[place].to(device) for place in places])
        for place, one in zip(places, together, strict=True):
            found[place] = one
    return found


def evaluate_detector(
    model: Detector,
    images: ObjectImages,
    batch_size: int,
    accelerator: Any,
    workers: int = 0,
) -> Detections:
    """Returns a detector's scores; with many processes each takes every so-manyth row, none twice.

    Args:
        model: On the accelerator's device; given back in the mode it came.
        images: The held-out split.
        batch_size: Images that a process reads at a time; changes no result by more than rounding.
        accelerator: Whose processes share the work; the main one scores, all get the scores.
        workers: Processes that read images, for each evaluating process.

    Raises:
        ValueError: If an image cannot be read.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    was_training = model.training
    started = time.perf_counter()
    rows = range(rank, len(images), ranks)
    mine = detect_rows(model.eval(), images, rows, batch_size, accelerator, workers, show=rank == 0)
    model.train(was_training)
    results = gather_object(mine) if ranks > 1 else mine
    scores: list[DetectionScores | None] = [None]
    if rank == 0:
        truth = images.truth()
        box, mask = (average_precision(truth, results, kind) for kind in (BY_BOX, BY_MASK))
        elapsed_s = time.perf_counter() - started
        scores = [
            DetectionScores(box=box, mask=mask, num_images=len(images), images_per_s=len(images) / elapsed_s)
        ]
    if ranks > 1:
        broadcast_object_list(scores)
    assert scores[0] is not None
    return Detections(scores[0], results if rank == 0 else [])
