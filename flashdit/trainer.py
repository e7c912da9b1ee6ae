"""The Trainer: FlashDiT by flow matching, in the loop that every trainer shares."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from flashdit.config import RunConfig
from flashdit.data.encode import open_latents
from flashdit.data.latents import LatentSpace
from flashdit.evaluation.evaluate import Plan, evaluate
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.request import EvaluationRequest, open_plan
from flashdit.flow.examples import Examples
from flashdit.flow.loss import flow_loss
from flashdit.flow.path import interpolate, velocity
from flashdit.flow.times import TIMES
from flashdit.models.costs import forward_flops
from flashdit.models.dit import FlashDiT
from flashdit.models.lightningdit import ROPE_KEYS, read_state
from flashdit.models.recompute import keep_matmuls
from flashdit.models.weights import fit_weights
from flashdit.sampling.generator import ImageGenerator
from flashdit.sampling.options import SamplingOptions, nfe
from flashdit.shared.files import write_atomically
from flashdit.shared.pictures import labelled_grid, rows_by_class
from flashdit.shared.runs import LATENTS, find_checkpoint, list_checkpoints, read_weights
from flashdit.shared.settings import to_yaml
from flashdit.training.loop import Batch, TrainingLoop

logger = logging.getLogger(__name__)
# A (C, 1, 3, 3) gradient in channels-last order has other strides and the same memory: nothing is slower.
warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
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

    def nfe(self, options: SamplingOptions) -> int | None:
        """Returns how many model evaluations one image takes."""
        return nfe(options)


class Trainer(TrainingLoop):
    """Trains one run: `Trainer(config).fit()`.

    Everything is built, loaded and checked before the first step. A run folder that holds checkpoints is
    resumed from the latest one.

    Args:
        config: The checked configuration.

    Raises:
        ValueError: If data, model and run folder do not fit together.
    """

    fixed_on_resume = ("seed", "data.", "latents.", "model.", "flow.")
    config: RunConfig
    model: FlashDiT

    def __init__(self, config: RunConfig):
        super().__init__(config, to_yaml)
        self.space.to(self.device)

    def build(self) -> nn.Module:
        """Opens the latents, builds the model and checks that they fit."""
        self.model = FlashDiT(**self.config.model)
        self.data, self.space = open_latents(self.config.data, self.config.latents, self.device, self.main)
        self.class_names = self.data.class_names or [str(i) for i in range(self.model.num_classes)]
        self._check_fit()
        self._open_evaluation()
        if self.config.weights is not None and not list_checkpoints(self.run_dir):
            new = start_from(self.model, self.config.weights)
            if self.main:
                logger.info("starts from %s; new: %s", self.config.weights, ", ".join(new) or "nothing")
        return self.model

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

    def _open_evaluation(self) -> None:
        """Opens what samples are scored against in training, before the first step."""
        self.plan: Plan | None = None
        options = self.config.evaluation
        if not options.every:
            return
        request = EvaluationRequest(
            generator=TrainedGenerator(self.model, self.space, self.class_names, 0),
            sampling=self.config.sampling,
            data=self.config.data["name"],
            num_images=options.num_images,
            reference=options.reference,
            extractor=options.extractor,
            extractor_weights=options.weights,
            metrics=options.metrics,
            device=str(self.device),
            cache=False,
        )
        self.ranks = Ranks.start(str(self.device))
        self.plan = open_plan(request, self.ranks)

    def checkpoint_activations(self) -> None:
        """Makes the model compute its blocks, or what is cheap in them, again in the backward pass."""
        self.model.enable_gradient_checkpointing(keep_matmuls if self.config.training.keep_matmuls else None)

    def examples(self) -> tuple[Dataset, int]:
        """Returns latents with their noise, times and dropped labels, by position."""
        config = self.config
        times = TIMES.build(config.flow.times)
        examples = Examples(self.data, times, config.seed, self.model.class_dropout_prob)
        return examples, len(self.data.labels)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the mean flow-matching loss of a batch, and its terms."""
        x_1, x_0, t = self.space.normalise(batch["latent"]), batch["noise"], batch["time"]
        with self.accelerator.autocast():
            v_t = self.network(interpolate(x_0, x_1, t), t, batch["label"], drop=batch["drop"])
        loss, terms = flow_loss(v_t, velocity(x_0, x_1), self.config.flow.loss)
        return loss.mean(), {name: value.mean() for name, value in terms.items()}

    def forward_flops(self) -> float:
        """Returns the FLOPs of one forward pass."""
        return forward_flops(self.config.model)

    @cached_property
    def copy(self) -> FlashDiT:
        """The one copy of the model, on the CPU, frozen and in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            return FlashDiT(**self.config.model).eval().requires_grad_(False)

    def _holding(self, weights: dict[str, Tensor]) -> FlashDiT:
        """Returns the copy with these weights."""
        self.copy.load_state_dict(weights)
        return self.copy

    def look_every(self) -> tuple[int, ...]:
        """Returns the steps between previews, where there is a VAE, and between evaluations."""
        every = self.config.training.preview_every if self.space.vae is not None else 0
        return every, self.config.evaluation.every

    def look(self, average: dict[str, Tensor]) -> dict[str, float]:
        """Writes a grid of the EMA's samples, and scores them, each where it is due."""
        preview, evaluation = map(self.due, self.look_every())
        if not (evaluation or self.main):
            return {}  # the main process alone draws previews
        model = self._holding(average)
        model.to(self.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
        generator = TrainedGenerator(model, self.space, self.class_names, self.step)
        if preview and self.main:
            self._write_preview(generator)
        scores = self._score(generator) if evaluation else {}
        model.to("cpu")  # pyright: ignore[reportCallIssue, reportArgumentType]
        return scores

    def _write_preview(self, generator: ImageGenerator) -> None:
        """Writes a grid of samples with fixed seeds."""
        classes = torch.arange(min(PREVIEW_CLASSES, len(self.class_names)))
        labels = classes.repeat_interleave(PREVIEW_PER_CLASS)
        images = torch.cat([batch.images for batch in generator.generate(labels, self.config.sampling)])
        title = f"step {self.step}, EMA, {self.config.sampling}"
        grid = labelled_grid(rows_by_class(images, labels, self.class_names, PREVIEW_PER_CLASS), title)
        path = self.run_dir / "samples" / f"step_{self.step:08d}.png"
        write_atomically(path, lambda temporary: grid.save(temporary, format="png"))

    def _score(self, generator: TrainedGenerator) -> dict[str, float]:
        """Returns the scores of samples that all processes draw and measure; no random state is touched."""
        assert self.plan is not None
        result = evaluate(self.plan.redrawn(generator=generator), self.ranks)
        return {name: value for name, value in result.to_dict()["metrics"].items() if value is not None}

    def write_models(self, folder: Path, weights: dict[str, Tensor], average: dict[str, Tensor]) -> None:
        """Writes the model and its average as diffusers folders, and the latent space."""
        folder.mkdir()
        self._holding(weights).save_pretrained(folder / "model")
        self._holding(average).save_pretrained(folder / "ema")
        self.space.save(folder / LATENTS)

    def describe(self) -> dict[str, Any]:
        """Returns what sampling needs to know of the run."""
        return {
            "class_names": self.class_names,
            "data_name": self.config.data["name"],
            "sampling": asdict(self.config.sampling),
        }


UNSEEN = ("num_heads", "time_scale")
"""Options that no tensor's shape shows: with others, the weights load and mean nothing."""


def check_unseen(model: FlashDiT, folder: Path) -> None:
    """Raises ValueError if a model folder's weights were trained with other such options."""
    theirs = json.loads((folder / "config.json").read_text())
    own = model.config
    other = [f"{key}={own[key]} for {theirs[key]}" for key in UNSEEN if theirs.get(key, own[key]) != own[key]]
    if other:
        rule = f"weights need the options they were trained with, those of {folder} too"
        raise ValueError(f"{rule}, got {', '.join(other)}")


def start_from(model: FlashDiT, source: Path | str) -> list[str]:
    """Loads weights to start from, for the same or another set of classes, resolution or kind of attention.

    Args:
        model: Freshly built; changed in place.
        source: A run or a checkpoint, whose average is meant; a folder of `save_pretrained`; or a file of
            weights in LightningDiT's or FlashDiT's layout.

    Returns:
        The names of what the weights lacked: zero convolutions, a label table for other classes.

    Raises:
        ValueError: If there are no weights, or they do not fit.
    """
    path = Path(source)
    if not path.exists():
        raise ValueError(f"weights must be a run, a checkpoint, a model folder or a file, got {path}")
    if path.is_file():
        weights = read_state(path)
    else:
        folder = path if (path / "config.json").is_file() else find_checkpoint(path) / "ema"
        check_unseen(model, folder)
        weights = read_weights(folder)
    weights = {key: value for key, value in weights.items() if key not in ROPE_KEYS}
    return fit_weights(model, weights, new_classes=True)
