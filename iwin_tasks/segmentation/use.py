"""A trained segmenter on a folder of pictures: label maps over them, and the maps themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torchvision.transforms.functional import pil_to_tensor

from flashdit.data.images import find_images, read_image, report_images
from flashdit.shared.command import resolve_device
from flashdit.shared.files import write_atomically
from flashdit.shared.paths import check_outside, check_writable
from flashdit.shared.pictures import save_png
from flashdit.shared.progress import progress_bar
from flashdit.shared.runs import find_checkpoint
from flashdit.training.accelerator import precision_name
from flashdit.training.resume import settle
from iwin_tasks.segmentation.augmentation import held_out_image
from iwin_tasks.segmentation.config import load_segmentation_config
from iwin_tasks.segmentation.data import by_stem
from iwin_tasks.segmentation.drawing import label_image, over_picture
from iwin_tasks.segmentation.evaluate import predict_classes
from iwin_tasks.segmentation.start import load_start, make_segmenter
from iwin_tasks.segmentation.task import SegmentationTask

WRITTEN_FOLDERS = ("pictures", "labels")
"""In the folder that is made: what is shown, and the maps themselves."""


@torch.inference_mode()
def segment_folder(run: Path, folder: Path, out: Path, overrides: Sequence[str] = ()) -> int:
    """Segments a folder of pictures, and returns how many they were.

    Of `a/b.jpg` `OUT/pictures/a/b.png` shows the classes over the picture, and the numbers of
    `OUT/labels/a/b.png` are the classes, from 0.

    Args:
        run: A run or a checkpoint of `iwin segment`, whose average and configuration are used.
        folder: Of pictures of any size.
        out: A folder that is not there yet or empty.
        overrides: `key=value` texts over the run's configuration, such as `inference.flip=true`.

    Raises:
        ValueError: If a folder is not as it must be, or a picture cannot be read.
    """
    checkpoint = find_checkpoint(run)
    config = load_segmentation_config(checkpoint / "config.yaml", overrides)
    check_outside(out, folder, "--out", "--images")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out must be a new folder or an empty one, got {out}")
    check_writable(out, "--out")
    found = find_images(folder, called="--images")
    paths = {stem: path for stem, (path, _) in by_stem(found).items()}
    model = make_segmenter(config.model)
    load_start(model, config.model, checkpoint)
    unreadable = dict(found.unreadable)
    settle(config, SegmentationTask, resolve_device(None))
    accelerator = Accelerator(mixed_precision=precision_name(config.training.precision))
    model = model.eval().to(accelerator.device)
    for stem, path in progress_bar(paths.items(), total=len(paths), desc="segment", unit="picture"):
        try:
            image = pil_to_tensor(read_image(path))
        except ValueError as error:
            unreadable[path.relative_to(folder).as_posix()] = str(error.__cause__ or error)
            continue
        seen = held_out_image(image, config.augmentation.scale)[None].to(accelerator.device)
        classes = predict_classes(model, seen, config.inference, image.shape[-2:], accelerator)[0].cpu()
        shown = over_picture(image, classes, config.model.num_classes)
        picture, labels = (
            (out / kind / stem).with_name(f"{Path(stem).name}.png") for kind in WRITTEN_FOLDERS
        )
        for file in (picture, labels):
            file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(picture, lambda temporary, shown=shown: save_png(shown, temporary))
        written = label_image(classes, config.model.num_classes)
        write_atomically(labels, lambda temporary, written=written: written.save(temporary, format="png"))
    report_images(found.describe(len(unreadable)), unreadable)
    return len(found.paths) + len(found.unreadable) - len(unreadable)
