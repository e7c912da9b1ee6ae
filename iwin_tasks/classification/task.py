"""Iwin backbones on labelled images as a task of the training loop: `ClassifierTrainer(config).fit()`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import pil_to_tensor

from flashdit.evaluation.features.extractor import colours_of
from flashdit.shared.command import resolve_device
from flashdit.shared.process import check_model_fits, float32_products, without_memory
from flashdit.shared.runs import list_checkpoints, read_state
from flashdit.training.accelerator import precision_name, start_run
from flashdit.training.checkpoint import stored_config
from flashdit.training.loop import TrainingLoop
from flashdit.training.options import share_of_batch
from flashdit.training.resume import check_same_task, settle
from flashdit.training.task import PeriodicAction, Task, Tensors
from iwin_core import IwinTransformer
from iwin_tasks.classification.augmentation import AugmentationOptions
from iwin_tasks.classification.config import ClassifierConfig
from iwin_tasks.classification.data import (
    CLASSIFICATION_DATASETS,
    FolderImages,
    HeldOutExamples,
    TrainExamples,
    check_same_classes,
    keep_readable,
    open_split,
)
from iwin_tasks.classification.evaluate import Accuracy, evaluate_classifier
from iwin_tasks.classification.model import (
    InputFormat,
    filled_spec,
    input_format,
    load_weights,
    make_model,
)


def form_of(config: ClassifierConfig, model: IwinTransformer) -> InputFormat:
    """Returns what images the model takes, with what the configuration says otherwise."""
    return input_format(model, config.augmentation.interpolation, config.augmentation.crop_pct)


def open_held_out(config: ClassifierConfig, model: IwinTransformer) -> HeldOutExamples:
    """Returns the held-out images as the model takes them."""
    form = form_of(config, model)
    run_dir = Path(config.run.dir)
    images = open_split(config.data, "held-out", form.image_size, model.num_classes, run_dir)
    return HeldOutExamples(images, form)


class ClassifierTask(Task[Tensors]):
    """An Iwin backbone on labelled images, evaluated on the held-out ones every `preview_every` steps.

    Args:
        config: The checked configuration.
        accelerator: Of the run.

    Attributes:
        accuracy: The last evaluation, None before the first.

    Raises:
        ValueError: If data and model do not fit together.
    """

    fixed_on_resume = ("seed", "data.", "model.", "augmentation.")
    by_content = ("data.path",)
    model: IwinTransformer
    accuracy: Accuracy | None = None

    def __init__(self, config: ClassifierConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        self.form = form_of(config, without_memory(lambda: make_model(config.model)))
        images = share_of_batch(config.training, accelerator.num_processes), 3, *self.form.image_size
        check_model_fits(lambda: make_model(config.model), images, accelerator.device)
        self.model = make_model(config.model)
        if config.weights is not None and not list_checkpoints(Path(config.run.dir)):
            load_weights(self.model, config.weights)
        run_dir = Path(config.run.dir)
        self.images = open_split(config.data, "train", self.form.image_size, self.model.num_classes, run_dir)
        self.held_out = open_held_out(config, self.model)
        check_same_classes(self.images, self.held_out.images)
        if isinstance(self.images, FolderImages) and isinstance(self.held_out.images, FolderImages):
            splits = self.images, self.held_out.images
            seen = keep_readable(*splits, run_dir, accelerator.is_main_process)
            self.at_start = [inspection.write for inspection in seen]
        shown = [pil_to_tensor(self.images.picture(row)) for row in range(min(16, len(self.images.labels)))]
        self.colours = "colour" if any(colours_of(image[None]) == "colour" for image in shown) else "grey"
        self.criterion = SoftTargetCrossEntropy()
        self.examples = TrainExamples(self.images, config.augmentation, self.form, config.seed)
        self.images_per_epoch = self.examples.size
        self.actions = [PeriodicAction(every=config.training.preview_every, run=self._evaluate)]

    def loss(self, network: Callable[..., Tensor], batch: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the mean cross-entropy of a batch with its soft targets."""
        return self.criterion(network(batch["image"]).float(), batch["target"]), {}

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Returns whether a parameter decays: biases, norms and position tables do not (DeiT, Swin)."""
        return parameter.ndim > 1 and name not in cast(Any, self.model).no_weight_decay()

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of every stage."""
        return [block for stage in self.model.stages() for block in stage.blocks]

    def checkpoint_activations(self) -> None:
        """Makes the model compute its blocks again in the backward pass."""
        self.model.set_grad_checkpointing(True)

    def forward_flops(self) -> float:
        """Returns the FLOPs of one forward pass, counted on a model without memory."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            make_model(self.config.model).eval()(torch.zeros(1, 3, *self.form.image_size))
        return counter.get_total_flops()

    @cached_property
    def copy(self) -> IwinTransformer:
        """The one copy of the model, frozen, that holds the average to be evaluated."""
        with torch.random.fork_rng(devices=[]):
            return make_model(self.config.model).requires_grad_(False).to(self.accelerator.device)

    def _evaluate(self, step: int, average: Tensors) -> dict[str, float]:
        """Returns the averaged model's accuracy on the held-out images."""
        self.copy.load_state_dict(average)
        self.accuracy = evaluate_classifier(
            self.copy,
            self.held_out,
            2 * share_of_batch(self.config.training, self.accelerator.num_processes),
            self.accelerator.device,
            self.accelerator,
            self.config.training.workers,
        )
        return self.accuracy.scores()

    def write_models(self, folder: Path, weights: Tensors, average: Tensors) -> None:
        """Writes the weights and their average under the authors' names, which timm's models load."""
        for name, tensors in (("model", weights), ("ema", average)):
            (folder / name).mkdir(parents=True)
            contiguous = {key: value.contiguous() for key, value in tensors.items()}
            save_file(contiguous, folder / name / "model.safetensors")
            (folder / name / "config.json").write_text(json.dumps(self.config.model, indent=2) + "\n")

    @staticmethod
    def filled(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a plain configuration with the defaults of data set, model and augmentation."""
        augmentation = asdict(AugmentationOptions()) | config.get("augmentation", {})
        return {
            **config,
            "data": CLASSIFICATION_DATASETS.filled(config.get("data")),
            "model": filled_spec(config.get("model", {})),
            "augmentation": json.loads(json.dumps(augmentation)),  # tuples are lists, as in YAML
        }

    def contents(self) -> dict[str, Any]:
        """Returns what the files of both splits are, wherever they lie."""
        splits = [
            images for images in (self.images, self.held_out.images) if isinstance(images, FolderImages)
        ]
        files = {name: size for images in splits for name, size in images.files().items()}
        return {"data.path": {"classes": self.images.class_names, "files": files} if splits else None}

    def known_contents(self, checkpoint: Path) -> dict[str, Any]:
        """Returns the classes that a checkpoint names."""
        return {"data.path": {"classes": read_state(checkpoint).get("class_names")}}

    def state(self) -> dict[str, Any]:
        """Returns what a reader of the checkpoint needs to know of the run."""
        return {
            "class_names": self.images.class_names,
            "data_name": self.config.data["name"],
            "colours": self.colours,
            "top1": None if self.accuracy is None else self.accuracy.top1,
        }


def ClassifierTrainer(config: ClassifierConfig) -> TrainingLoop[ClassifierTask]:
    """Returns the loop that trains a classifier: `ClassifierTrainer(config).fit()`.

    A run folder that holds checkpoints is resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """
    accelerator = start_run(config, ClassifierTask)
    return TrainingLoop(config, ClassifierTask(config, accelerator), accelerator)


def evaluate_only(config: ClassifierConfig) -> tuple[str, Accuracy]:
    """Returns what was evaluated, the run's latest average or else `weights`, and its accuracy.

    Raises:
        ValueError: If there is neither, or the held-out images cannot be read.
    """
    settle(config, ClassifierTask, resolve_device(None))
    accelerator = Accelerator(mixed_precision=precision_name(config.training.precision))
    run_dir = Path(config.run.dir)
    source = run_dir if list_checkpoints(run_dir) else config.weights
    if source is None:
        raise ValueError(f"--eval-only needs a trained run in run.dir or weights=PATH, got {run_dir} without")
    for checkpoint in list_checkpoints(run_dir)[-1:]:
        check_same_task(checkpoint, stored_config(checkpoint), asdict(config))
    model = make_model(config.model)
    load_weights(model, source)
    batch_size = max(1, config.training.global_batch_size // accelerator.num_processes)
    held_out = open_held_out(config, model)
    device, workers = accelerator.device, config.training.workers
    with float32_products(tf32=config.training.tf32):
        accuracy = evaluate_classifier(model.to(device), held_out, batch_size, device, accelerator, workers)
    return str(source), accuracy
