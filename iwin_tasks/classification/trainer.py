"""The ClassifierTrainer: Iwin backbones on labelled images, in the loop that every trainer shares."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from flashdit.shared.runs import list_checkpoints
from flashdit.shared.settings import to_yaml
from flashdit.training.accelerator import precision_name
from flashdit.training.loop import Batch, TrainingLoop
from iwin_core import IwinTransformer
from iwin_tasks.classification.config import ClassifierConfig
from iwin_tasks.classification.data import (
    HeldOutExamples,
    TrainExamples,
    check_same_classes,
    open_split,
)
from iwin_tasks.classification.evaluate import Accuracy, evaluate_classifier
from iwin_tasks.classification.model import (
    InputFormat,
    decay_groups,
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
    images = open_split(config.data, "held-out", form.image_size, model.num_classes)
    return HeldOutExamples(images, form)


class ClassifierTrainer(TrainingLoop):
    """Trains one run: `ClassifierTrainer(config).fit()`; the EMA is evaluated every `preview_every` steps.

    Args:
        config: The checked configuration.

    Attributes:
        accuracy: The last evaluation, None before the first.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """

    fixed_on_resume = ("seed", "data.", "model.", "augmentation.")
    config: ClassifierConfig
    model: IwinTransformer
    accuracy: Accuracy | None = None

    def __init__(self, config: ClassifierConfig):
        super().__init__(config, to_yaml)

    def build(self) -> nn.Module:
        """Builds the model, loads the weights it starts from and opens both splits."""
        self.model = make_model(self.config.model)
        if self.config.weights is not None and not list_checkpoints(self.run_dir):
            load_weights(self.model, self.config.weights)
        self.form = form_of(self.config, self.model)
        self.images = open_split(self.config.data, "train", self.form.image_size, self.model.num_classes)
        self.held_out = open_held_out(self.config, self.model)
        check_same_classes(self.images, self.held_out.images)
        self.criterion = SoftTargetCrossEntropy()
        return self.model

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the parameters that decay and those that do not."""
        return decay_groups(self.model, self.config.optimizer.weight_decay)

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks of every stage."""
        return [block for stage in self.model.stages() for block in stage.blocks]

    def checkpoint_activations(self) -> None:
        """Makes the model compute its blocks again in the backward pass."""
        self.model.set_grad_checkpointing(True)

    def examples(self) -> tuple[Dataset, int]:
        """Returns augmented images with their targets, by position."""
        examples = TrainExamples(self.images, self.config.augmentation, self.form, self.config.seed)
        return examples, examples.size

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean cross-entropy of a batch with its soft targets."""
        with self.accelerator.autocast():
            logits = self.network(batch["image"])
        return self.criterion(logits.float(), batch["target"]), {}

    def forward_flops(self) -> float:
        """Returns the FLOPs of one forward pass, counted on a model without memory."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            make_model(self.config.model).eval()(torch.zeros(1, 3, *self.form.image_size))
        return counter.get_total_flops()

    @cached_property
    def copy(self) -> nn.Module:
        """The one copy of the model, frozen, that holds the average to be evaluated."""
        with torch.random.fork_rng(devices=[]):
            return make_model(self.config.model).requires_grad_(False).to(self.device)

    def look(self, average: dict[str, Tensor]) -> dict[str, float]:
        """Returns the EMA's accuracy on the held-out images."""
        self.copy.load_state_dict(average)
        self.accuracy = evaluate_classifier(
            self.copy,
            self.held_out,
            2 * self.batch_size,
            self.device,
            self.accelerator,
            self.config.training.workers,
        )
        return {"ema_top1": self.accuracy.top1, "ema_top5": self.accuracy.top5}

    def write_models(self, folder: Path, weights: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        """Writes the weights and their average under the authors' names, which timm's models load."""
        for name, tensors in (("model", weights), ("ema", average)):
            (folder / name).mkdir(parents=True)
            contiguous = {key: value.contiguous() for key, value in tensors.items()}
            save_file(contiguous, folder / name / "model.safetensors")
            (folder / name / "config.json").write_text(json.dumps(self.config.model, indent=2) + "\n")

    def describe(self) -> dict[str, Any]:
        """Returns what a reader of the checkpoint needs to know of the run."""
        return {"class_names": self.images.class_names, "data_name": self.config.data["name"]}


def evaluate_only(config: ClassifierConfig) -> tuple[str, Accuracy]:
    """Returns what was evaluated, the run's latest average or else `weights`, and its accuracy.

    Raises:
        ValueError: If there is neither, or the held-out images cannot be read.
    """
    accelerator = Accelerator(mixed_precision=precision_name(config.training.precision))
    run_dir = Path(config.run.dir)
    source = run_dir if list_checkpoints(run_dir) else config.weights
    if source is None:
        raise ValueError(f"--eval-only needs a trained run in run.dir or weights=PATH, got {run_dir} without")
    model = make_model(config.model)
    load_weights(model, source)
    batch_size = max(1, config.training.global_batch_size // accelerator.num_processes)
    accuracy = evaluate_classifier(
        cast(IwinTransformer, model.to(accelerator.device)),
        open_held_out(config, model),
        batch_size,
        accelerator.device,
        accelerator,
        config.training.workers,
    )
    return str(source), accuracy
