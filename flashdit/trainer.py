"""FlashDiT by flow matching as a task of the training loop: `Trainer(config).fit()`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flashdit.config import RunConfig, with_sizes_of_data
from flashdit.data.encode import open_latents
from flashdit.data.fit import check_fit
from flashdit.data.inspection import RECORD, Inspection
from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.data.shards import LatentShards
from flashdit.data.sources import DATASETS, spec_of
from flashdit.evaluation.evaluate import evaluate
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.request import EvaluationRequest, open_plan
from flashdit.flow.examples import Examples
from flashdit.flow.loss import flow_loss, velocity_mse
from flashdit.flow.mean_flow import (
    COST,
    RANDOM_NUMBERS,
    MeanFlowOptions,
    draw_stretch,
    mean_flow_loss,
)
from flashdit.flow.path import interpolate, velocity
from flashdit.flow.times import TIMES
from flashdit.memory import check_step_fits
from flashdit.models.attention import describe_attention, each_attention, fill_attention
from flashdit.models.costs import forward_flops
from flashdit.models.dit import FlashDiT, default_arguments
from flashdit.models.recompute import keep_matmuls
from flashdit.models.weights import start_from
from flashdit.sampling.generator import ImageGenerator, check_channels
from flashdit.sampling.imagenet import shown_names
from flashdit.shared.files import write_atomically
from flashdit.shared.pictures import InvalidPixels, labelled_grid, rows_by_class
from flashdit.shared.process import float32_products, precision_here
from flashdit.shared.runs import (
    LATENTS,
    PREVIEWS,
    check_whole,
    list_checkpoints,
    newest_readable,
    read_state,
)
from flashdit.teachers.alignment import (
    EXTRACTOR_KEY,
    Alignment,
    AlignmentOptions,
    alignment_loss,
    open_alignment,
)
from flashdit.teachers.distillation import TEACHER_KEY, DistillationOptions, Teacher, open_teacher
from flashdit.training.accelerator import compile_parts, is_sharded, start_run
from flashdit.training.loop import TrainingLoop
from flashdit.training.task import PeriodicAction, Task, Tensors

logger = logging.getLogger(__name__)
PREVIEW_CLASSES, PREVIEW_PER_CLASS = 10, 4
FROZEN = {"teacher": TEACHER_KEY, "extractor": EXTRACTOR_KEY}
"""The networks that a run learns from: their names in state.json, and the keys that name them."""


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
            data=spec_of(config.data),
            data_path=config.data.get("path") if config.data["name"] == "images" else None,
            labels=options.labels,
            num_images=options.num_images,
            reference=options.reference,
            extractor=options.extractor,
            extractor_weights=options.weights,
            metrics=options.metrics,
            background=config.data.get("background", "white"),
            image_size=options.image_size or self._image_size(config, generator),
            device=str(device),
            cache=False,
        )
        self.ranks = Ranks.start(str(device))
        self.plan = open_plan(request, self.ranks)

    @staticmethod
    def _image_size(config: RunConfig, generator: TrainedGenerator) -> int | None:
        """Returns the side of the samples, to which images of a reference folder are cropped."""
        reference = config.evaluation.reference
        height, width = generator.image_size(config.sampling)
        return height if reference and Path(reference).is_dir() and height == width else None

    def __call__(self, generator: TrainedGenerator) -> dict[str, float]:
        """Returns the scores of samples that all processes draw and measure; no random state is touched."""
        result = evaluate(self.plan.redrawn(generator=generator), self.ranks)
        return {name: value for name, value in result.to_dict()["metrics"].items() if value is not None}


class FlashDiTTask(Task[Tensors]):
    """A FlashDiT, its latents and the flow-matching loss.

    Args:
        config: The checked configuration.
        accelerator: Of the run.

    Raises:
        ValueError: If data, model and evaluation do not fit together.
    """

    fixed_on_resume = (
        "seed",
        "data.",
        "latents.multiplier",
        "model.",
        "flow.",
        "distillation.",
        "alignment.",
    )
    by_content = ("data.path", *FROZEN.values(), "alignment.extractor_weights")
    automatic: ClassVar = {**Task.automatic, "sampling.precision": precision_here}
    model: FlashDiT

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.config, self.main, self.device = config, accelerator.is_main_process, accelerator.device
        self.run_dir = Path(config.run.dir)
        self.model = FlashDiT(**config.model_arguments)
        inspection = Inspection(self.run_dir / RECORD)
        self.at_start = [inspection.write]
        self.data, self.space = open_latents(config.data, config.latents, self.device, self.main, inspection)
        self._check_same_space()
        self.class_names = self.data.class_names or [str(i) for i in range(self.model.num_classes)]
        check_fit(self.model.config, self.data, self.space.vae)
        if self.main and isinstance(self.data, LatentShards):
            logger.info("the shards of %s were compared %s", self.data.folder, self.data.compared)
        if not self.model.num_classes:
            self.class_names = []
            if self.main:
                count = len(self.data.class_names or []) or int(self.data.labels.max()) + 1
                logger.info("model.num_classes=0: the data's classes, %d, are left out", count)
        preview_every = config.training.preview_every if self.space.vae is not None else 0
        self.actions = [PeriodicAction(every=preview_every, run=self._write_preview)]
        generator = TrainedGenerator(self.model, self.space, self.class_names, 0)
        check_channels(config.sampling.cfg_channels, self.model, "sampling.cfg_channels")
        if preview_every:
            generator.check_batch_fits(config.sampling, 1)
        if config.evaluation.every:
            self.evaluation = InTrainingEvaluation(config, generator, self.device)
            self.actions.append(PeriodicAction(every=config.evaluation.every, run=self._score))
        if config.weights is not None and not list_checkpoints(self.run_dir):
            new = start_from(self.model, config.weights, self.class_names)
            if self.main:
                logger.info("starts from %s; new: %s", config.weights, "; ".join(new) or "nothing")
        attention = self.model.config["attention"]
        if self.main and len(each_attention(attention)) > 1:
            logger.info("attention: %s", describe_attention(attention, len(self.model.blocks)))
        self.space.to(self.device)
        self.teacher = self._open_teacher(accelerator)
        self.alignment = self._open_alignment(accelerator)
        self.times = TIMES.build(config.flow.times)
        dropped = self.model.class_dropout_prob if self.model.num_classes else 1.0
        more = RANDOM_NUMBERS if config.flow.mean_flow.enabled else 0
        images = None if self.alignment is None else getattr(self.data, "images", None)
        self.examples = Examples(self.data, self.times, config.seed, dropped, more, images)
        self.images_per_epoch = len(self.data.labels)

    def _open_teacher(self, accelerator: Accelerator) -> Teacher | None:
        """Returns the teacher that the run learns from, compiled as its model; None where it has none."""
        source, training = self.config.distillation.teacher, self.config.training
        if source is None:
            return None
        place = self.class_names, self.space, self.device
        teacher = open_teacher(source, self.model, *place, accelerator.autocast)
        compile_parts(teacher.model, lambda: teacher.model.blocks, training.compile)
        return teacher

    def _open_alignment(self, accelerator: Accelerator) -> Alignment | None:
        """Returns what the run's tokens are aligned with; None where that is nothing."""
        options = self.config.alignment
        if options.extractor is None:
            return None
        reads_images = not isinstance(self.data, LatentShards)
        if self.main and not reads_images:
            logger.info("%s sees images that are decoded from the latents at each step", EXTRACTOR_KEY)
        place = self.device, accelerator.autocast, self.config.seed
        return open_alignment(options, self.model, self.space, reads_images, *place)

    @property
    def trained(self) -> nn.Module:
        """The model, in the module that projects its tokens where they are aligned."""
        return self.model if self.alignment is None else self.alignment.network

    def _check_same_space(self) -> None:
        """Raises ValueError if a run goes on in another space, or with another autoencoder, than it began.

        An autoencoder that the run did not name before is accepted where it fits, and so is a moved one.
        """

        def read_space(checkpoint: Path) -> LatentSpace:
            check_whole(checkpoint, LATENTS)
            return LatentSpace.read(checkpoint / LATENTS)

        begun = newest_readable(self.run_dir, read_space)
        if begun is None:
            return
        before, now = begun.options, self.space.options
        if before.space != now.space:
            raise ValueError(f"{self.run_dir} holds a run with latents.space={before.space}, got {now.space}")
        if before.vae is not None and now.vae is None:
            raise ValueError(f"{self.run_dir} holds a run with latents.vae={before.vae}, got null")
        self.space.check_made_by(begun, f"the run in {self.run_dir}")

    def loss(self, network: Callable[..., Tensor], batch: Tensors) -> tuple[Tensor, Tensors]:
        """Returns the mean loss of a batch, of flow matching or of mean flows, and its terms."""
        losses = self._mean_flow_losses if self.config.flow.mean_flow.enabled else self._flow_losses
        loss, terms = losses(network, self.space.normalise(batch["latent"]), batch)
        return loss.mean(), {name: value.mean() for name, value in terms.items()}

    def _mean_flow_losses(
        self, network: Callable[..., Tensor], x_1: Tensor, batch: Tensors
    ) -> tuple[Tensor, Tensors]:
        """Returns the loss of each sample (B,), and its terms."""
        options, label, drop = self.config.flow.mean_flow, batch["label"], batch["drop"]
        at = draw_stretch(batch["time"], self.times, batch["more"], drop, options)
        return mean_flow_loss(network, self.model, batch["noise"], x_1, label, drop, at, options)

    def _flow_losses(
        self, network: Callable[..., Tensor], x_1: Tensor, batch: Tensors
    ) -> tuple[Tensor, Tensors]:
        """Returns the loss of each sample (B,), and its terms."""
        x_0, t, label, drop = (batch[name] for name in ("noise", "time", "label", "drop"))
        x_t = interpolate(x_0, x_1, t)
        # Both before the model's own pass, whose activations wait for the backward pass.
        taught = None if self.teacher is None else self.teacher.velocity(x_t, t, label, drop)
        aligned = None if self.alignment is None else self.alignment.features(batch, x_1)
        output = network(x_t, t, label, drop=drop)
        v_t, projected = (output, None) if aligned is None else output
        loss, terms = flow_loss(v_t, velocity(x_0, x_1), self.config.flow.loss)
        if taught is not None:
            terms["teacher"] = velocity_mse(v_t, taught)
            loss = loss + self.config.distillation.weight * terms["teacher"]
        if aligned is not None and projected is not None:
            terms["alignment"] = alignment_loss(projected, aligned)
            loss = loss + self.config.alignment.weight * terms["alignment"]
        return loss, terms

    def checkpoint_activations(self) -> None:
        """Makes the model compute its blocks, or what is cheap in them, again in the backward pass."""
        self.model.enable_gradient_checkpointing(keep_matmuls if self.config.training.keep_matmuls else None)

    def forward_flops(self) -> float:
        """Returns a third of a training step's FLOPs: those of a forward pass, or more for mean flows."""
        flops = forward_flops(self.config.model_arguments)
        if self.alignment is not None:
            flops += self.alignment.projector_flops()
        return flops * COST if self.config.flow.mean_flow.enabled else flops

    def frozen_flops(self) -> float:
        """Returns the FLOPs of the teacher's forward pass, and of the extractor's features."""
        taught = 0.0 if self.teacher is None else forward_flops(self.teacher.arguments)
        return taught if self.alignment is None else taught + self.alignment.frozen_flops()

    @cached_property
    def copy(self) -> FlashDiT:
        """The one copy of the model, on the CPU, frozen and in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            return FlashDiT(**self.config.model_arguments).eval().requires_grad_(False)

    def _holding(self, weights: Tensors) -> FlashDiT:
        """Returns the copy with these weights."""
        self.copy.load_state_dict(weights)
        return self.copy

    @contextmanager
    def _generator(self, step: int, average: Tensors) -> Iterator[TrainedGenerator]:
        """Gives the generator of the averaged weights, on the device while it is used."""
        model = self._holding(average)
        model.to(self.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        try:
            yield TrainedGenerator(model, self.space, self.class_names, step)
        finally:
            model.to("cpu")  # pyright: ignore[reportCallIssue, reportArgumentType]

    def _write_preview(self, step: int, average: Tensors) -> dict[str, float]:
        """Writes a grid of samples with fixed seeds, on the main process alone."""
        if not self.main:
            return {}
        classes = torch.arange(max(1, min(PREVIEW_CLASSES, len(self.class_names))))
        labels = classes.repeat_interleave(PREVIEW_PER_CLASS)
        try:
            with self._generator(step, average) as generator:
                batches = list(generator.generate(labels, self.config.sampling))
        except InvalidPixels as error:  # a picture tells of the run, whose own numbers the guard watches
            logger.warning("step %d: no preview: %s", step, error)
            return {}
        images = torch.cat([batch.images for batch in batches])
        title = f"step {step}, EMA, {self.config.sampling}"
        grid = labelled_grid(
            rows_by_class(images, labels, shown_names(self.class_names) or [""], PREVIEW_PER_CLASS), title
        )
        path = self.run_dir / PREVIEWS / f"step_{step:08d}.png"
        write_atomically(path, lambda temporary: grid.save(temporary, format="png"))
        return {}

    def _score(self, step: int, average: Tensors) -> dict[str, float]:
        """Returns the scores of the averaged model's samples."""
        with self._generator(step, average) as generator:
            try:
                return self.evaluation(generator)
            except ValueError as error:  # on all processes, of which one has an InvalidPixels
                if self.main:
                    logger.warning("step %d: no scores: %s", step, error)
                return {}

    def write_models(self, folder: Path, weights: Tensors, average: Tensors) -> None:
        """Writes the model and its average as diffusers folders, and the latent space."""
        folder.mkdir()
        self._holding(weights).save_pretrained(folder / "model")
        self._holding(average).save_pretrained(folder / "ema")
        self.space.save(folder / LATENTS)
        if self.alignment is not None:
            self.alignment.save(folder)

    def restore(self, folder: Path) -> None:
        """Loads the projector of a checkpoint, if the run has one."""
        if self.alignment is not None:
            self.alignment.load(folder)

    @staticmethod
    def filled(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a plain configuration with the defaults of data set, model, attention and times."""
        model = json.loads(json.dumps(default_arguments() | config.get("model", {})))  # as YAML has tuples
        model["attention"] = fill_attention(model["attention"])
        flow = {**config.get("flow", {})}
        flow["times"] = TIMES.filled(flow.get("times"))
        flow["prediction"] = flow.get("prediction") or model["prediction"]
        flow["mean_flow"] = asdict(MeanFlowOptions(**(flow.get("mean_flow") or {})))
        latents = {"space": LatentOptions.space, **config.get("latents", {})}
        teaching = asdict(DistillationOptions()) | config.get("distillation", {})
        parts = {
            "data": DATASETS.filled(config.get("data")),
            "latents": latents,
            "model": model,
            "flow": flow,
        }
        aligning = asdict(AlignmentOptions()) | config.get("alignment", {})
        return {**config, **parts, "distillation": teaching, "alignment": aligning}

    def contents(self) -> dict[str, Any]:
        """Returns what the data set's files are, wherever they lie, and the frozen networks that teach."""
        identity = getattr(self.data, "identity", None)
        frozen = {FROZEN[name]: value for name, value in self._identities.items()}
        return {"data.path": identity() if identity is not None else None, **frozen}

    @property
    def _identities(self) -> dict[str, str]:
        """What the frozen networks of the run are, by FROZEN's names."""
        found = {"teacher": self.teacher, "extractor": self.alignment}
        return {name: network.identity for name, network in found.items() if network is not None}

    def known_contents(self, checkpoint: Path) -> dict[str, Any]:
        """Returns the classes that a checkpoint names, and its frozen networks."""
        state = read_state(checkpoint)
        return {
            "data.path": {"classes": state.get("class_names")},
            **{key: state.get(name) for name, key in FROZEN.items()},
        }

    def state(self) -> dict[str, Any]:
        """Returns what sampling needs to know of the run."""
        return {
            "class_names": self.class_names,
            "data_name": self.config.data["name"],
            "sampling": asdict(self.config.sampling),
            **self._identities,
        }


def Trainer(config: RunConfig) -> TrainingLoop[FlashDiTTask]:
    """Returns the loop that trains a FlashDiT: `Trainer(config).fit()`.

    Everything is built, loaded and checked before the first step. A run folder that holds checkpoints is
    resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together, or a step does not fit into memory.
    """
    config = with_sizes_of_data(config)
    accelerator = start_run(config, FlashDiTTask)
    sharded = is_sharded(accelerator)
    for name, is_on in (
        ("flow.mean_flow", config.flow.mean_flow.enabled),
        (EXTRACTOR_KEY, config.alignment.extractor is not None),
    ):
        if sharded and is_on:
            raise ValueError(f"{name} requires whole models on each device (DDP), got FSDP2")
    check_step_fits(config, accelerator.device, accelerator.num_processes, sharded)
    with float32_products(tf32=config.training.tf32):  # images are encoded as they are trained on
        task = FlashDiTTask(config, accelerator)
    return TrainingLoop(config, task, accelerator)
