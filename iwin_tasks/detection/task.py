"""Detectors on images with objects as a task of the training loop: `DetectionTrainer(config).fit()`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from flashdit.shared.command import resolve_device
from flashdit.shared.files import write_atomically
from flashdit.shared.pictures import panel_grid
from flashdit.shared.process import check_model_fits, float32_products
from flashdit.shared.runs import PREVIEWS, list_checkpoints, newest_readable, read_state
from flashdit.training.accelerator import precision_name, start_run
from flashdit.training.checkpoint import stored_config
from flashdit.training.loop import TrainingLoop
from flashdit.training.options import share_of_batch
from flashdit.training.resume import check_same_task, settle
from flashdit.training.task import PeriodicAction, Task, Tensors
from iwin_tasks.detection.augmentation import ObjectAugmentation
from iwin_tasks.detection.config import DetectionConfig
from iwin_tasks.detection.costs import detector_flops
from iwin_tasks.detection.data import (
    DETECTION_DATASETS,
    CocoImages,
    ObjectExamples,
    ObjectImages,
    check_same_categories,
    open_objects,
)
from iwin_tasks.detection.detector import Detector
from iwin_tasks.detection.drawing import draw_objects, on_one_size
from iwin_tasks.detection.evaluate import Detections, DetectionScores, evaluate_detector, find_objects
from iwin_tasks.detection.model import (
    DetectorSpec,
    backbone_blocks,
    detector_config,
    load_detector_weights,
    make_detector,
)
from iwin_tasks.detection.proposals import CANVAS_MULTIPLE

PREVIEW_IMAGES, PREVIEW_COLUMNS = 8, 4
FLOPS_EXAMPLES = 4
PREVIEW_SCORE = 0.5
"""From which on a detection is drawn."""


class ObjectBatch(TypedDict):
    """Images of any sizes and what is on each, as a `Detector` takes them."""

    images: list[Tensor]
    targets: list[Tensors]


class DetectionTask(Task[ObjectBatch]):
    """A detector, scored on the held-out images every `preview_every` steps.

    Args:
        config: The checked configuration.
        accelerator: Of the run.

    Attributes:
        found: The last scores, None before the first.

    Raises:
        ValueError: If the data are invalid, or weights do not fit.
    """

    fixed_on_resume = ("seed", "data.", "model.", "augmentation.")
    by_content = ("data.path",)
    model: Detector
    found: DetectionScores | None = None

    def __init__(self, config: DetectionConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.images, self.held_out = (open_objects(config.data, split) for split in ("train", "held-out"))
        check_same_categories(self.images, self.held_out)
        self.categories = self.images.categories
        run_dir = Path(config.run.dir)
        check_same_ids(run_dir, self.images)
        begun = bool(list_checkpoints(run_dir))
        share = share_of_batch(config.training, accelerator.num_processes)
        sides = max(config.augmentation.short_sides, default=config.model.short_side)
        check_model_fits(self._make, (share, 3, sides, sides), accelerator.device)
        self.model = self._make()
        if config.weights is not None and not begun:
            load_detector_weights(self.model, config.model, config.weights)
        self.examples = ObjectExamples(self.images, config.augmentation, config.seed)
        self.images_per_epoch = self.examples.size
        self.actions = [PeriodicAction(every=config.training.preview_every, run=self._evaluate)]

    def _make(self) -> Detector:
        """Returns the detector of the configuration, freshly initialised."""
        return make_detector(self.config.model, len(self.categories))

    @staticmethod
    def collate(items: Any) -> ObjectBatch:
        """Returns the images and the targets of a batch, in two lists."""
        return {"images": [item["image"] for item in items], "targets": [item["target"] for item in items]}

    def loss(self, network: Callable[..., Any], batch: ObjectBatch) -> tuple[Tensor, Tensors]:
        """Returns the sum of the detector's losses, and each by its name."""
        losses = network(batch["images"], batch["targets"])
        return torch.stack(list(losses.values())).sum(), losses

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of every stage of an Iwin backbone."""
        blocks = backbone_blocks(self.model)
        if not blocks and self.config.training.compile == "block":
            raise ValueError(
                "training.compile=block requires an Iwin backbone, whose blocks are known, "
                f"got {self.config.model.backbone}"
            )
        return blocks

    def checkpoint_activations(self) -> None:
        """Makes the backbone compute its blocks again in the backward pass."""
        switch = getattr(self.model.backbone.body, "set_grad_checkpointing", None)
        if switch is None:
            raise ValueError(
                f"training.gradient_checkpointing requires an Iwin backbone, got {self.config.model.backbone}"
            )
        switch(True)

    def forward_flops(self) -> float:
        """Returns the FLOPs of one image's forward pass, the mean of the first few examples' canvases."""
        few = [self.examples[position]["image"].shape[-2:] for position in range(FLOPS_EXAMPLES)]
        boxes = self.config.model.sampled_boxes
        sizes = [[-(-side // CANVAS_MULTIPLE) * CANVAS_MULTIPLE for side in size] for size in few]
        counts = [detector_flops(self.model, *size, boxes=boxes, masks=-(-boxes // 4)) for size in sizes]
        return sum(counts) / len(counts)

    @cached_property
    def copy(self) -> Detector:
        """The one copy of the model, frozen, that holds the average to be evaluated."""
        with torch.random.fork_rng(devices=[]):
            return self._make().requires_grad_(False).to(self.accelerator.device).eval()

    def _evaluate(self, step: int, average: Tensors) -> dict[str, float]:
        """Returns the averaged model's precision on the held-out images, and draws some of them."""
        self.copy.load_state_dict(average)
        training = self.config.training
        share = share_of_batch(training, self.accelerator.num_processes)
        found = evaluate_detector(self.copy, self.held_out, share, self.accelerator, training.workers)
        self.found = found.scores
        if self.accelerator.is_main_process:
            self._draw(step)
        return self.found.scores()

    @torch.inference_mode()
    def _draw(self, step: int) -> None:
        """Writes a picture of the first held-out images with what is found on them."""
        images = [self.held_out.image(row) for row in range(min(PREVIEW_IMAGES, len(self.held_out)))]
        drawn = []
        for image in images:
            (one,) = find_objects(self.copy, [image.float() / 255], self.accelerator)
            kept = {name: value[one["scores"] >= PREVIEW_SCORE].cpu() for name, value in one.items()}
            drawn.append(draw_objects(image, kept, self.categories.names))
        cells = on_one_size(drawn)
        starts = range(0, len(cells), PREVIEW_COLUMNS)
        rows = [("", cells[start : start + PREVIEW_COLUMNS]) for start in starts]
        assert self.found is not None
        grid = panel_grid(rows, title=f"step {step}, EMA, box AP50 {self.found.box.ap50:.1%}")
        path = Path(self.config.run.dir) / PREVIEWS / f"step_{step:08d}.png"
        write_atomically(path, lambda temporary: grid.save(temporary, format="png"))

    def write_models(self, folder: Path, weights: Tensors, average: Tensors) -> None:
        """Writes the weights and their average, and beside them what the detector is made of."""
        config = detector_config(self.config.model, self.categories)
        for name, tensors in (("model", weights), ("ema", average)):
            (folder / name).mkdir(parents=True)
            contiguous = {key: value.contiguous() for key, value in tensors.items()}
            save_file(contiguous, folder / name / "model.safetensors")
            (folder / name / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @staticmethod
    def filled(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a plain configuration with the defaults of data set, model and augmentation."""
        defaults = {"model": asdict(DetectorSpec()), "augmentation": asdict(ObjectAugmentation())}
        return {
            **config,
            "data": DETECTION_DATASETS.filled(config.get("data")),
            **{
                name: json.loads(json.dumps(options | dict(config.get(name, {}))))  # tuples are lists
                for name, options in defaults.items()
            },
        }

    def contents(self) -> dict[str, Any]:
        """Returns what the files of both splits are, wherever they lie."""
        splits = [images for images in (self.images, self.held_out) if isinstance(images, CocoImages)]
        files = {name: size for images in splits for name, size in images.files().items()}
        return {"data.path": {"classes": list(self.categories.names), "files": files} if splits else None}

    def known_contents(self, checkpoint: Path) -> dict[str, Any]:
        """Returns the classes that a checkpoint names."""
        return {"data.path": {"classes": read_state(checkpoint).get("class_names")}}

    def state(self) -> dict[str, Any]:
        """Returns what a reader of the checkpoint needs to know of the run."""
        return {
            "class_names": list(self.categories.names),
            "category_ids": list(self.categories.ids),
            "data_name": self.config.data["name"],
            "box_ap": None if self.found is None else self.found.box.ap,
            "mask_ap": None if self.found is None else self.found.mask.ap,
        }


def check_same_ids(run_dir: Path, images: ObjectImages) -> None:
    """Refuses to resume where labels would mean other categories than in the run's newest checkpoint.

    Raises:
        ValueError: Naming the numbers of classes, or the first category that differs.
    """

    def of(checkpoint: Path) -> tuple[Any, Any]:
        state = read_state(checkpoint)
        return state.get("category_ids"), state.get("class_names")

    ids, names = newest_readable(run_dir, of) or (None, None)
    if ids is None or names is None:
        return
    before, now = list(zip(ids, names, strict=True)), images.categories.pairs()
    if len(before) != len(now):
        raise ValueError(
            f"{run_dir} holds a run on {len(before)} classes, got data of {len(now)}: give another run.dir"
        )
    different = [(old, new) for old, new in zip(before, now, strict=True) if old != new]
    if different:
        (old_id, old_name), (new_id, new_name) = different[0]
        raise ValueError(
            f"{run_dir} holds a run whose category {old_id} is {old_name}, got {new_name} with {new_id} "
            "in its place: give another run.dir"
        )


def DetectionTrainer(config: DetectionConfig) -> TrainingLoop[DetectionTask]:
    """Returns the loop that trains a detector: `DetectionTrainer(config).fit()`.

    A run folder that holds checkpoints is resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """
    accelerator = start_run(config, DetectionTask)
    return TrainingLoop(config, DetectionTask(config, accelerator), accelerator)


def score_only(config: DetectionConfig, weights_first: bool = False) -> tuple[str, Detections]:
    """Returns what was scored, the run's latest average or else `weights`, and its scores and results.

    Args:
        config: The checked configuration.
        weights_first: Whether `weights` is meant also where the run has a checkpoint.

    Raises:
        ValueError: If there is neither, or the held-out images cannot be read.
    """
    settle(config, DetectionTask, resolve_device(None))
    accelerator = Accelerator(mixed_precision=precision_name(config.training.precision))
    run_dir = Path(config.run.dir)
    is_run = bool(list_checkpoints(run_dir)) and not weights_first
    source = run_dir if is_run else config.weights
    if source is None:
        raise ValueError(f"--eval-only needs a trained run in run.dir or weights=PATH, got {run_dir} without")
    held_out = open_objects(config.data, "held-out")
    if is_run:
        checkpoint = list_checkpoints(run_dir)[-1]
        check_same_task(checkpoint, stored_config(checkpoint), asdict(config))
        check_same_ids(run_dir, held_out)
    model = make_detector(config.model, len(held_out.categories))
    load_detector_weights(model, config.model, source, whole=True)
    batch_size = max(1, config.training.global_batch_size // accelerator.num_processes)
    with float32_products(tf32=config.training.tf32):
        model = model.to(accelerator.device)
        found = evaluate_detector(model, held_out, batch_size, accelerator, config.training.workers)
    return str(source), found
