"""FlashDiT by flow matching as a task of the training loop: `Trainer(config).fit()`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from flashdit.config import RunConfig
from flashdit.data.encode import open_latents
from flashdit.data.inspection import RECORD
from flashdit.data.latents import LatentSpace
from flashdit.evaluation.evaluate import evaluate
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.request import EvaluationRequest, open_plan
from flashdit.flow.examples import Examples
from flashdit.flow.loss import flow_loss
from flashdit.flow.path import interpolate, velocity
from flashdit.flow.times import TIMES
from flashdit.models.costs import forward_flops
from flashdit.models.dit import FlashDiT
from flashdit.models.recompute import keep_matmuls
from flashdit.models.weights import start_from
from flashdit.sampling.generator import ImageGenerator
from flashdit.shared.files import write_atomically
from flashdit.shared.pictures import labelled_grid, rows_by_class
from flashdit.shared.process import float32_products
from flashdit.shared.runs import LATENTS, list_checkpoints
from flashdit.training.accelerator import start_run
from flashdit.training.loop import TrainingLoop
from flashdit.training.task import PeriodicAction, Task, Tensors

logger = logging.getLogger(__name__)
PREVIEW_CLASSES, PREVIEW_PER_CLASS = 10, 4


class TrainedGenerator(ImageGenerator):
    """The EMA of a run that is being trained, as an evaluation reads it.

    Args:
        model: With the averaged weights, in evaluation mode.
        space: Its latent space, with the VAE.
        class_names: One per class.
        step: Of the run.
    """

    def __init__(self, model: FlashDiT, space: LatentSpace, class_names: list[str], step: int):
        super().__init__(model, space, class_names)
        self.step = step

    def recipe(self) -> dict[str, Any]:
        """Returns what identifies the model."""
        return {"step": self.step, "weights": "ema"}


class InTrainingEvaluation:
    """Scores of the averaged model's samples; everything is opened before the first step.

    Args:
        config: Of the run.
        generator: Of its samples.
        device: Where samples are drawn and measured.

    Raises:
        ValueError: If a metric, the extractor or the reference is invalid or missing, or there is no VAE.
    """

    def __init__(self, config: RunConfig, generator: TrainedGenerator, device: torch.device):
        options = config.evaluation
        request = EvaluationRequest(
            generator=generator,
            sampling=config.sampling,
            data=config.data["name"],
            num_images=options.num_images,
            reference=options.reference,
            extractor=options.extractor,
            extractor_weights=options.weights,
            metrics=options.metrics,
            background=config.data.get("background", "white"),
            device=str(device),
            cache=False,
        )
        self.ranks = Ranks.start(str(device))
        self.plan = open_plan(request, self.ranks)

    def __call__(self, generator: TrainedGenerator) -> dict[str, float]:
        """Returns the scores of samples that all processes draw and measure; no random state is touched."""
        result = evaluate(self.plan.redrawn(generator=generator), self.ranks)
        return {name: value for name, value in result.to_dict()["metrics"].items() if value is not None}


class FlashDiTTask(Task):
    """A FlashDiT, its latents and the flow-matching loss.

    Args:
        config: The checked configuration.
        accelerator: Of the run.

    Raises:
        ValueError: If data, model and evaluation do not fit together.
    """

    fixed_on_resume = ("seed", "data.", "latents.", "model.", "flow.")
    model: FlashDiT

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.config, self.main, self.device = config, accelerator.is_main_process, accelerator.device
        self.run_dir = Path(config.run.dir)
        self.model = FlashDiT(**config.model)
        self.data, self.space = open_latents(
            config.data, config.latents, self.device, self.main, self.run_dir / RECORD
        )
        self.class_names = self.data.class_names or [str(i) for i in range(self.model.num_classes)]
        self._check_fit()
        preview_every = config.training.preview_every if self.space.vae is not None else 0
        self.actions = [PeriodicAction(every=preview_every, run=self._write_preview)]
        if config.evaluation.every:
            generator = TrainedGenerator(self.model, self.space, self.class_names, 0)
            self.evaluation = InTrainingEvaluation(config, generator, self.device)
            self.actions.append(PeriodicAction(every=config.evaluation.every, run=self._score))
        if config.weights is not None and not list_checkpoints(self.run_dir):
            new = start_from(self.model, config.weights)
            if self.main:
                logger.info("starts from %s; new: %s", config.weights, ", ".join(new) or "nothing")
        self.space.to(self.device)
        times = TIMES.build(config.flow.times)
        self.examples = Examples(self.data, times, config.seed, self.model.class_dropout_prob)
        self.images_per_epoch = len(self.data.labels)

    def _check_fit(self) -> None:
        """Raises ValueError unless the model takes these latents and labels."""
        shape, labels, num_classes = self.data.shape, self.data.labels, self.model.num_classes
        channels, side = (self.model.config[name] for name in ("in_channels", "sample_size"))
        if shape != (channels, side, side):
            raise ValueError(
                f"the data's latents must be what the model takes, model.in_channels={channels} and "
                f"model.sample_size={side}, got {' × '.join(map(str, shape))}"
            )
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"labels must be from 0 to below model.num_classes={num_classes}, got {lowest} to {highest}"
            )
        if self.data.class_names and len(self.data.class_names) != num_classes:
            count = len(self.data.class_names)
            raise ValueError(f"model.num_classes must be the data's {count} classes, got {num_classes}")

    def loss(self, network: Callable[..., Tensor], batch: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the mean flow-matching loss of a batch, and its terms."""
        x_1, x_0, t = self.space.normalise(batch["latent"]), batch["noise"], batch["time"]
        v_t = network(interpolate(x_0, x_1, t), t, batch["label"], drop=batch["drop"])
        loss, terms = flow_loss(v_t, velocity(x_0, x_1), self.config.flow.loss)
        return loss.mean(), {name: value.mean() for name, value in terms.items()}

    def checkpoint_activations(self) -> None:
        """Makes the model compute its blocks, or what is cheap in them, again in the backward pass."""
        self.model.enable_gradient_checkpointing(keep_matmuls if self.config.training.keep_matmuls else None)

    def forward_flops(self) -> float:
        """Returns the FLOPs of one forward pass."""
        return forward_flops(self.config.model)

    @cached_property
    def copy(self) -> FlashDiT:
        """The one copy of the model, on the CPU, frozen and in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            return FlashDiT(**self.config.model).eval().requires_grad_(False)

    def _holding(self, weights: Tensors) -> FlashDiT:
        """Returns the copy with these weights."""
        self.copy.load_state_dict(weights)
        return self.copy

    @contextmanager
    def _generator(self, step: int, average: Tensors) -> Iterator[TrainedGenerator]:
        """Gives the generator of the averaged weights, on the device while it is used."""
        model = self._holding(average)
        model.to(self.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        yield TrainedGenerator(model, self.space, self.class_names, step)
        model.to("cpu")  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _write_preview(self, step: int, average: Tensors) -> dict[str, float]:
        """Writes a grid of samples with fixed seeds, on the main process alone."""
        if not self.main:
            return {}
        classes = torch.arange(min(PREVIEW_CLASSES, len(self.class_names)))
        labels = classes.repeat_interleave(PREVIEW_PER_CLASS)
        with self._generator(step, average) as generator:
            images = torch.cat([batch.images for batch in generator.generate(labels, self.config.sampling)])
        title = f"step {step}, EMA, {self.config.sampling}"
        grid = labelled_grid(rows_by_class(images, labels, self.class_names, PREVIEW_PER_CLASS), title)
        path = self.run_dir / "samples" / f"step_{step:08d}.png"
        write_atomically(path, lambda temporary: grid.save(temporary, format="png"))
        return {}

    def _score(self, step: int, average: Tensors) -> dict[str, float]:
        """Returns the scores of the averaged model's samples."""
        with self._generator(step, average) as generator:
            return self.evaluation(generator)

    def write_models(self, folder: Path, weights: Tensors, average: Tensors) -> None:
        """Writes the model and its average as diffusers folders, and the latent space."""
        folder.mkdir()
        self._holding(weights).save_pretrained(folder / "model")
        self._holding(average).save_pretrained(folder / "ema")
        self.space.save(folder / LATENTS)

    def state(self) -> dict[str, Any]:
        """Returns what sampling needs to know of the run."""
        return {
            "class_names": self.class_names,
            "data_name": self.config.data["name"],
            "sampling": asdict(self.config.sampling),
        }


def Trainer(config: RunConfig) -> TrainingLoop[FlashDiTTask]:
    """Returns the loop that trains a FlashDiT: `Trainer(config).fit()`.

    Everything is built, loaded and checked before the first step. A run folder that holds checkpoints is
    resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """
    accelerator = start_run(config, FlashDiTTask.fixed_on_resume)
    with float32_products(tf32=config.training.tf32):  # images are encoded as they are trained on
        task = FlashDiTTask(config, accelerator)
    return TrainingLoop(config, task, accelerator)
