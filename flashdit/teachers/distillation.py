"""A trained FlashDiT as the teacher of another: what it must be, what it predicts, what it costs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.models.dit import FlashDiT, default_arguments
from flashdit.models.lightningdit import infer_config
from flashdit.models.sizes import SIZES
from flashdit.models.weights import same_classes
from flashdit.sampling.checkpoint import load_model
from flashdit.shared.registry import check_finite
from flashdit.shared.runs import LATENTS, check_whole, find_average, read_state
from flashdit.shared.weights import read_model_config, read_tensors, tensors_sha256

logger = logging.getLogger(__name__)
TEACHER_KEY = "distillation.teacher"
_NAMED = 3  # that a message names
SAME_STATISTICS = 1e-4
"""Relative difference of latent statistics above which two spaces are not the same."""


@dataclass(kw_only=True)
class DistillationOptions:
    """Options of learning from a teacher's predictions."""

    teacher: str | None = None
    """A run, a checkpoint, an exported pipeline, a model folder or a file of LightningDiT's weights, whose
    velocity the model learns to predict too; None leaves it out."""
    weight: float = 0.5
    """Of the squared error to the teacher's velocity, beside the flow-matching loss; LiT has 0.5."""

    def __post_init__(self) -> None:
        """Checks the values."""
        check_finite(self, "distillation.")
        if self.weight < 0:
            raise ValueError(f"distillation.weight must not be negative, got {self.weight}")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model and what is known of its training."""

    model: FlashDiT
    class_names: Sequence[str] | None = None
    """None where nothing tells them."""
    space: LatentSpace | None = None
    """Its latent space, without the autoencoder; None where nothing tells it."""


class Teacher:
    """A frozen model whose velocity another one learns to predict.

    It takes the same noisy latents, times and dropped labels as its student, and scales the times itself.

    Args:
        model: Frozen, in evaluation mode.
        rows: Which of its classes each of the student's is, (num_classes,) int64; None for a student without.
        autocast: Gives the context that the student computes in.

    Source: LiT (Wang et al. 2025, arXiv 2501.12976), hybrid knowledge distillation; nothing here predicts the
    variance that it distils besides.
    """

    def __init__(
        self, model: FlashDiT, rows: Tensor | None, autocast: Callable[..., AbstractContextManager[Any]]
    ):
        self.model, self.rows, self.autocast = model, rows, autocast

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of FlashDiT that it was made with."""
        return {name: self.model.config[name] for name in default_arguments()}

    @cached_property
    def identity(self) -> str:
        """SHA-256 of its arguments and weights, as hexadecimal digits."""
        return tensors_sha256(self.model.state_dict(), json.dumps(self.arguments, sort_keys=True))

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor, drop: Tensor) -> Tensor:
        """Returns its velocity (B, C, H, W).

        Args:
            x_t: Noisy latents (B, C, H, W), as the student has them.
            t: Times (B,) in [0, 1].
            y: The student's labels (B,).
            drop: Which of them are dropped, bool (B,).
        """
        labels = torch.zeros_like(y) if self.rows is None else self.rows[y]
        with self.autocast():
            return self.model(x_t, t, labels, drop=drop)


def open_teacher(
    source: str,
    student: FlashDiT,
    class_names: Sequence[str],
    space: LatentSpace,
    device: torch.device,
    autocast: Callable[..., AbstractContextManager[Any]],
) -> Teacher:
    """Returns the teacher of a run, on the device, once it is known to fit.

    Args:
        source: As `DistillationOptions.teacher` has it.
        student: The model that learns.
        class_names: The student's.
        space: The student's latent space.
        device: Where both compute.
        autocast: Gives the context that the student computes in.

    Raises:
        ValueError: If there is no such model, or it was trained on other latents, sizes or classes, or never
            without labels where the student is.
    """
    trained = read_trained(source)
    _check_sizes(trained.model, student)
    if trained.space is None:
        logger.info("%s: nothing tells the latents that %s was trained on", TEACHER_KEY, source)
    else:
        _check_space(trained.space, space, source)
    rows = _rows(trained, student, class_names, source)
    model = trained.model.eval().requires_grad_(False)
    model.to(device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return Teacher(model, None if rows is None else rows.to(device), autocast)


def read_trained(source: str) -> Trained:
    """Returns a trained model, with its averaged weights where it has such, on the CPU.

    Raises:
        ValueError: If there is none, or its files are damaged.
    """
    path = _find(source)
    if path.is_file():
        with torch.random.fork_rng(devices=[]):  # the weights that it is made with are drawn
            return Trained(model=FlashDiT.from_lightningdit(path))
    model, parent = load_model(path), path.parent
    index = parent / "model_index.json"
    if index.is_file():
        about = json.loads(index.read_text())
        names, recipe = about.get("id2label"), about.get("recipe") or {}
        options = LatentOptions(space=about["latents_space"], multiplier=about["latents_multiplier"])
        mean, std = (torch.tensor(about[f"latents_{name}"]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
        space = LatentSpace(mean, std, options, identity=recipe.get("vae_identity"))
        return Trained(
            model=model, class_names=names and [names[str(i)] for i in range(len(names))], space=space
        )
    if (parent / LATENTS).is_file():
        check_whole(parent, LATENTS)
        names = read_state(parent).get("class_names")
        return Trained(model=model, class_names=names, space=LatentSpace.read(parent / LATENTS))
    return Trained(model=model)


def teacher_arguments(source: str) -> dict[str, Any]:
    """Returns the arguments of FlashDiT that a teacher was made with.

    Raises:
        ValueError: If there is none.
    """
    path = _find(source)
    if path.is_file():
        return infer_config(read_tensors(path), SIZES)
    stored = read_model_config(path)
    return {name: stored[name] for name in default_arguments() if name in stored}


def _find(source: str) -> Path:
    """Returns the model's folder or the weights' file of a text; raises ValueError if there is none."""
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"{TEACHER_KEY} must be a run, a checkpoint, an exported pipeline, a model folder or a file of "
            f"weights, there is no {path}"
        )
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    return path if path.is_file() else find_average(path, TEACHER_KEY)


def _check_sizes(teacher: FlashDiT, student: FlashDiT) -> None:
    """Raises ValueError for a teacher of latents of another shape."""
    for name in ("sample_size", "in_channels"):
        if teacher.config[name] != student.config[name]:
            rule = f"{TEACHER_KEY} must have the run's model.{name}={student.config[name]}"
            raise ValueError(f"{rule}, got one of {teacher.config[name]}")


def _check_space(theirs: LatentSpace, ours: LatentSpace, source: str) -> None:
    """Raises ValueError for a teacher of other latents."""
    if theirs.options.space != ours.options.space:
        rule = f"{TEACHER_KEY} must be trained with the run's latents.space={ours.options.space}"
        raise ValueError(f"{rule}, got one of {theirs.options.space}")
    ours.check_made_by(theirs, f"the teacher {source}")
    factors = torch.tensor(theirs.options.multiplier), torch.tensor(ours.options.multiplier)
    for name, found, own in (
        ("multiplier", *factors),
        ("mean", theirs.mean, ours.mean.cpu()),
        ("standard deviation", theirs.std, ours.std.cpu()),
    ):
        if not torch.allclose(found, own, rtol=SAME_STATISTICS, atol=SAME_STATISTICS * ours.std.min().item()):
            values = f"{_shown(own)} for {_shown(found)} of {source}"
            raise ValueError(f"{TEACHER_KEY} must be trained on latents of the run's {name}, got {values}")


def _shown(values: Tensor) -> str:
    """Returns the first few of a tensor's values."""
    texts = [f"{value:.4g}" for value in values.flatten()[:_NAMED].tolist()]
    return ", ".join(texts) + (", …" if values.numel() > _NAMED else "")


def _rows(trained: Trained, student: FlashDiT, class_names: Sequence[str], source: str) -> Tensor | None:
    """Returns which of the teacher's classes each of the student's is, by their names where both have such.

    Raises:
        ValueError: If the teacher does not know them all, or was never trained without labels.
    """
    teacher, count = trained.model, student.num_classes
    drops = not count or student.class_dropout_prob > 0
    if drops and teacher.num_classes and not teacher.class_dropout_prob:
        rule = f"{TEACHER_KEY} must be trained without labels too where the run is"
        raise ValueError(f"{rule}, {source} has class_dropout_prob=0")
    if not count:
        return None
    if trained.class_names is None or not teacher.num_classes:
        if teacher.num_classes != count:
            rule = f"{TEACHER_KEY} must know the run's {count} classes"
            raise ValueError(f"{rule}, {source} has {teacher.num_classes}, without names")
        logger.info("%s: its %d classes have no names and are taken in order", TEACHER_KEY, count)
        return torch.arange(count)
    rows = same_classes(class_names, trained.class_names)
    if rows is None:
        return torch.arange(count)
    unknown = [name for name, row in zip(class_names, rows, strict=True) if row is None]
    if unknown:
        shown = ", ".join(f"'{name}'" for name in unknown[:_NAMED])
        more = ", …" if unknown[_NAMED:] else ""
        raise ValueError(f"{TEACHER_KEY} must know the run's classes by name, {source} lacks {shown}{more}")
    return torch.tensor(rows)
