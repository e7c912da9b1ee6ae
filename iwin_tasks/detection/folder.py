"""Detections as files: results for COCO's server, and a folder of images with what is found on them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torchvision.transforms.functional import pil_to_tensor

from flashdit.data.images import find_images, read_image, report_images
from flashdit.shared.files import write_atomically
from flashdit.shared.paths import check_outside, check_replaceable, check_writable, printable
from flashdit.shared.progress import progress_bar
from flashdit.shared.registry import counted
from iwin_tasks.detection.average_precision import results_of
from iwin_tasks.detection.drawing import draw_objects
from iwin_tasks.detection.evaluate import find_objects
from iwin_tasks.detection.model import read_detector

DETECTIONS = "detections.json"
RESULTS_MARK = '"segmentation": '
"""Text that a file of results holds, unless nothing was found."""
FOLDER_MARK = '"found_by": "iwin detect"'


def check_results(path: Path | str) -> None:
    """Raises ValueError unless results can be written at a path, where nothing of another kind lies."""
    path = Path(path)
    check_writable(path.parent, "--results")
    if path.is_file():
        text = path.read_bytes().strip()
        if text == b"[]":
            return
        if not text.startswith(b"["):  # annotations have the mark as well
            raise ValueError(
                f"--results must be a new file or an earlier list of results, got {printable(path)}"
            )
    check_replaceable(path, RESULTS_MARK, "--results")


def write_results(path: Path | str, results: Sequence[Mapping[str, Any]]) -> None:
    """Writes results as COCO's server takes them: one list of detections."""
    _write(Path(path), list(results))


def _write(path: Path, content: Any) -> None:
    """Writes a json, whole or not at all."""
    text = json.dumps(content, allow_nan=False)
    write_atomically(path, lambda temporary: temporary.write_text(text + "\n"))


@torch.inference_mode()
def detect_folder(run: Path | str, images: Path | str, out: Path | str, threshold: float) -> str:
    """Finds objects on each image of a folder, draws them, and returns what was done in a line.

    `OUT/NAME.png` is the image NAME with boxes, masks and names from the threshold on; `OUT/detections.json`
    has all of them, laid out as a COCO json with a score for each annotation.

    Args:
        run: Of `iwin detect`, or one of its checkpoints.
        images: Folder of images, searched to any depth.
        out: Folder that is new, empty, or an earlier one of this function, which is replaced in part.
        threshold: Least score of what is drawn, from 0 to 1.

    Raises:
        ValueError: If the run, the images or the folder are not so.
    """
    root, target = Path(images), Path(out)
    check_writable(target, "--out")
    check_outside(target, root, "--out", "--images")
    check_replaceable(target / DETECTIONS, FOLDER_MARK, f"{DETECTIONS} in --out")
    if target.is_dir() and any(target.iterdir()) and not (target / DETECTIONS).is_file():
        raise ValueError(f"--out must be a new or empty folder, or one of an earlier call, got {target}")
    model, categories = read_detector(run)
    found = find_images(root, called="--images")
    accelerator = Accelerator()
    model.to(accelerator.device)
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    content = {
        "info": {"found_by": "iwin detect", "checkpoint": str(run)},
        "images": listed,
        "annotations": annotations,
        "categories": categories.listed(),
    }
    _write(target / DETECTIONS, content)  # at once: after a kill the folder is known to be this function's
    unreadable = dict(found.unreadable)
    for path in progress_bar(found.paths, desc="detect", unit="image"):
        name = path.relative_to(root).as_posix()
        try:
            image = pil_to_tensor(read_image(path))
        except ValueError as error:
            unreadable[name] = str(error.__cause__ or error)
            continue
        (one,) = find_objects(model, [image.float() / 255], accelerator)
        number = len(listed) + 1
        listed.append({"id": number, "file_name": name, "height": image.shape[-2], "width": image.shape[-1]})
        annotations += results_of(one, number, categories)
        kept = {key: value[one["scores"] >= threshold].cpu() for key, value in one.items()}
        picture = draw_objects(image, kept, categories.names)
        write_atomically(
            target / f"{name}.png", lambda temporary, drawn=picture: drawn.save(temporary, format="png")
        )
    report_images(found.describe(len(unreadable)), unreadable)
    if not listed:
        raise ValueError(f"--images must have an image that can be read, {printable(root)} has none")
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    _write(target / DETECTIONS, content)
    return f"{counted(len(annotations), 'object')} on {counted(len(listed), 'image')}: {target}"
