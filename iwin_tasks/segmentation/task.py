"""Segmenters as a task of the training loop: `SegmentationTrainer(config).fit()`; scores without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import default_collate

from flashdit.shared.command import resolve_device
from flashdit.shared.files import write_atomically
from flashdit.shared.process import check_model_fits, float32_products
from flashdit.shared.runs import PREVIEWS, list_checkpoints
from flashdit.training.accelerator import precision_name, start_run
from flashdit.training.checkpoint import stored_config
from flashdit.training.loop import TrainingLoop
from flashdit.training.options import share_of_batch
from flashdit.training.resume import check_same_task, settle
from flashdit.training.task import PeriodicAction, Task, Tensors
from iwin_core import IwinFeatures
from iwin_tasks.segmentation.augmentation import PixelAugmentation, held_out_image
from iwin_tasks.segmentation.config import SegmentationConfig
from iwin_tasks.segmentation.costs import segmenter_flops
from iwin_tasks.segmentation.data import (
    SEGMENTATION_DATASETS,
    HeldOutPixels,
    LabelFolder,
    PixelExamples,
    open_pixels,
)
from iwin_tasks.segmentation.drawing import side_by_side
from iwin_tasks.segmentation.evaluate import SegmentationResult, evaluate_segmenter, predict_classes
from iwin_tasks.segmentation.model import Segmenter
from iwin_tasks.segmentation.start import SegmenterOptions, load_start, make_segmenter

MOST_PREVIEWS = 6
"""Held-out images in a preview; those of the first one's size."""


def open_held_out_pixels(config: SegmentationConfig) -> HeldOutPixels:
    """Returns the held-out images as the model is tested on them."""
    images = open_pixels(config.data, "held-out", config.model.num_classes)
    return HeldOutPixels(images, config.augmentation.scale)


class SegmentationTask(Task[Tensors]):
    """A segmenter on images with labels, evaluated on the held-out ones every `preview_every` steps.

    Args:
        config: The checked configuration.
        accelerator: Of the run.

    Attributes:
        result: The last evaluation, None before the first.

    Raises:
        ValueError: If data and model do not fit together.
    """

    fixed_on_resume = ("seed", "data.", "model.", "augmentation.", "class_weights")
    by_content = ("data.path",)
    model: Segmenter
    result: SegmentationResult | None = None

    def __init__(self, config: SegmentationConfig, accelerator: Accelerator):
        self.config, self.accelerator, self.run_dir = config, accelerator, Path(config.run.dir)
        self.images = open_pixels(config.data, "train", config.model.num_classes)
        self.held_out = open_held_out_pixels(config)
        self.examples = PixelExamples(self.images, config.augmentation, config.seed)
        self.images_per_epoch = self.examples.size
        make = partial(make_segmenter, config.model)
        height, width = self.examples[0]["label"].shape
        self.image_size = height, width
        share = share_of_batch(config.training, accelerator.num_processes)
        shares_norms = accelerator.num_processes > 1 and accelerator.device.type == "cuda"
        if config.model.kind == "upernet" and share < 2 and not shares_norms:
            raise ValueError(
                "model.kind=upernet requires two images a process at once, as its pooled map of one pixel is "
                f"normalised over them, got {share}"
            )
        check_model_fits(make, (share, 3, *self.image_size), accelerator.device)
        self.model = make()
        if config.weights is not None and not list_checkpoints(self.run_dir):
            load_start(self.model, config.model, config.weights)
        weights = config.class_weights
        self.class_weights = None if weights is None else torch.tensor(weights, device=accelerator.device)
        self.actions = [PeriodicAction(every=config.training.preview_every, run=self._evaluate)]

    @staticmethod
    def collate(items: list[Tensors]) -> Tensors:
        """Returns the batch of some examples.

        Raises:
            ValueError: If they are of several sizes.
        """
        sizes = sorted({tuple(item["label"].shape) for item in items})
        if len(sizes) > 1:
            raise ValueError(
                "training images must be of one size where augmentation.crop is null, got "
                f"{' and '.join(f'{height} × {width}' for height, width in sizes)}"
            )
        return default_collate(items)

    def loss(self, network: Callable[..., Any], batch: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the sum of the heads' losses, and each with its share of right pixels."""
        found = network(batch["image"], batch["label"], self.images.ignore, self.class_weights)
        total = torch.stack([value for name, value in found.items() if name.endswith("loss_seg")]).sum()
        return total, {name: value.detach() for name, value in found.items()}

    def blocks(self) -> Iterable[nn.Module]:
        """Returns the backbone's blocks, where it is not Iwin the backbone."""
        backbone = self.model.backbone
        if not isinstance(backbone, IwinFeatures):
            return [backbone]
        return [block for stage in backbone.stages() for block in stage.blocks]

    def checkpoint_activations(self) -> None:
        """Makes the backbone compute its blocks again in the backward pass."""
        switch = getattr(self.model.backbone, "set_grad_checkpointing", None)
        if switch is None:
            name = self.config.model.backbone
            raise ValueError(f"training.gradient_checkpointing requires a backbone that has it, got {name}")
        switch(True)

    def forward_flops(self) -> float:
        """Returns the FLOPs of one training image's logits; the auxiliary head is not counted."""
        return segmenter_flops(self.model, *self.image_size)

    @cached_property
    def copy(self) -> Segmenter:
        """The one copy of the model, frozen, that holds the average to be evaluated."""
        with torch.random.fork_rng(devices=[]):
            model = make_segmenter(self.config.model)
        return model.requires_grad_(False).eval().to(self.accelerator.device)

    def _evaluate(self, step: int, average: Tensors) -> dict[str, float]:
        """Returns the averaged model's scores on the held-out images, and draws some."""
        self.copy.load_state_dict(average)
        self.result = evaluate_segmenter(
            self.copy,
            self.held_out,
            self.config.inference,
            share_of_batch(self.config.training, self.accelerator.num_processes),
            self.config.model.num_classes,
            self.accelerator,
            self.config.training.workers,
        )
        if self.accelerator.is_main_process:
            self._draw(step)
        return self.result.recorded()

    def _draw(self, step: int) -> None:
        """Draws held-out images, their truth and what the copy predicts."""
        rows, size = [], None
        for row in range(min(MOST_PREVIEWS, len(self.held_out))):
            image, labels = self.held_out.images.pair(row)
            size = size or labels.shape
            if labels.shape != size:
                continue
            seen = held_out_image(image, self.config.augmentation.scale)[None].to(self.accelerator.device)
            found = predict_classes(self.copy, seen, self.config.inference, size, self.accelerator)
            rows.append((image, labels, found[0].cpu()))
        assert self.result is not None
        picture = side_by_side(
            rows, self.config.model.num_classes, f"step {step:,}, mIoU {self.result.scores.miou:.1%}"
        )
        path = self.run_dir / PREVIEWS / f"step_{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: picture.save(temporary, format="png"))

    def write_models(self, folder: Path, weights: Tensors, average: Tensors) -> None:
        """Writes the weights and their average under mmsegmentation's names."""
        for name, tensors in (("model", weights), ("ema", average)):
            (folder / name).mkdir(parents=True)
            contiguous = {key: value.contiguous() for key, value in tensors.items()}
            save_file(contiguous, folder / name / "model.safetensors")
            about = {"_class_name": "Segmenter", **asdict(self.config.model)}
            (folder / name / "config.json").write_text(json.dumps(about, indent=2) + "\n")

    @staticmethod
    def filled(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a plain configuration with the defaults of data set, model and augmentation."""
        model, augmentation = asdict(SegmenterOptions()), asdict(PixelAugmentation())
        return {
            **config,
            "data": SEGMENTATION_DATASETS.filled(config.get("data")),
            "model": model | config.get("model", {}),
            "augmentation": json.loads(json.dumps(augmentation)) | config.get("augmentation", {}),
            "class_weights": config.get("class_weights"),
        }

    def contents(self) -> dict[str, Any]:
        """Returns what the files of both splits are, wherever they lie."""
        splits = [images for images in (self.images, self.held_out.images) if isinstance(images, LabelFolder)]
        files = {name: size for images in splits for name, size in images.files().items()}
        return {"data.path": {"files": files} if splits else None}

    def state(self) -> dict[str, Any]:
        """Returns what a reader of the checkpoint needs to know of the run."""
        return {
            "class_names": self.images.class_names,
            "data_name": self.config.data["name"],
            "miou": None if self.result is None else self.result.scores.miou,
        }


def SegmentationTrainer(config: SegmentationConfig) -> TrainingLoop[SegmentationTask]:
    """Returns the loop that trains a segmenter: `SegmentationTrainer(config).fit()`.

    A run folder that holds checkpoints is resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """
    accelerator = start_run(config, SegmentationTask)
    return TrainingLoop(config, SegmentationTask(config, accelerator), accelerator)


def evaluate_run(config: SegmentationConfig, weights: Path | None = None) -> tuple[str, SegmentationResult]:
    """Returns what was evaluated and its scores, without training.

    Args:
        config: Of data, model and inference.
        weights: What `load_start` takes; None means the run's latest average or else `config.weights`.

    Raises:
        ValueError: If there is none of them, or the held-out images cannot be read.
    """
    run_dir = Path(config.run.dir)
    settle(config, SegmentationTask, resolve_device(None))
    if weights is None:
        for checkpoint in list_checkpoints(run_dir)[-1:]:
            check_same_task(checkpoint, stored_config(checkpoint), cast(dict[str, Any], asdict(config)))
    source = weights or (run_dir if list_checkpoints(run_dir) else config.weights)
    if source is None:
        rule = "--eval-only needs a trained run in run.dir or --weights PATH"
        raise ValueError(f"{rule}, got {run_dir} without")
    accelerator = Accelerator(mixed_precision=precision_name(config.training.precision))
    held_out, model = open_held_out_pixels(config), make_segmenter(config.model)
    load_start(model, config.model, source, whole=True)
    batch_size = max(1, config.training.global_batch_size // accelerator.num_processes)
    with float32_products(tf32=config.training.tf32):
        result = evaluate_segmenter(
            model.to(accelerator.device),
            held_out,
            config.inference,
            batch_size,
            config.model.num_classes,
            accelerator,
            config.training.workers,
        )
    return str(source), result
