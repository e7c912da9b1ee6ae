"""What a task gives the training loop: a model, examples, a loss, and what its checkpoints hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from flashdit.shared.process import attention_here, precision_here

Tensors = dict[str, Tensor]
Batch = TypeVar("Batch")
"""What a task's `collate` makes: a nest of dicts, lists and tuples of tensors, of any sizes."""


@dataclass(frozen=True, kw_only=True)
class PeriodicAction:
    """What is done with the averaged weights every so many steps, and after the last one."""

    every: int
    """Optimiser steps between two of them; 0 means never."""
    run: Callable[[int, Tensors], dict[str, float]]
    """Takes the step and the whole average by name, on the CPU; returns numbers for the log. All processes
    call it."""


class Task(ABC, Generic[Batch]):
    """What is trained; the loop asks for nothing else.

    Attributes:
        fixed_on_resume: Prefixes of configuration keys that a resumed run may not change.
        by_content: Those among these keys that name data, which are compared by content (see `contents`).
        automatic: What `auto` of a key means on a device, by key; it stays what it was when the run began.
        model: Fresh, on the CPU; the loop moves, wraps, compiles, averages and resumes it.
        examples: Data set by position in the endless stream of images. A step takes as many positions as
            `training.global_batch_size` says, whatever a batch of them holds.
        images_per_epoch: Images of an epoch.
        actions: What is done with the averaged weights, and when.
        ends_are_kept: Whether the checkpoints at which a training ended stay, whatever `training.keep_last`
            says, since others may need them.
        at_start: What is called once the run may begin, to write what it keeps beside checkpoints.
    """

    fixed_on_resume: ClassVar[tuple[str, ...]] = ("seed", "data.", "model.")
    by_content: ClassVar[tuple[str, ...]] = ()
    automatic: ClassVar[Mapping[str, Callable[[str], str]]] = {
        "training.precision": precision_here,
        "training.cpu_attention": attention_here,
    }
    ends_are_kept: ClassVar[bool] = False
    model: nn.Module
    examples: Dataset
    images_per_epoch: int
    actions: Sequence[PeriodicAction] = ()
    at_start: Sequence[Callable[[], None]] = ()

    @staticmethod
    def collate(items: Any) -> Any:
        """Returns the batch of some examples, or what a data set made of them at once as it is.

        Static, since the processes that read get it without the task; images of unequal sizes need another.

        Args:
            items: A list of examples, or a dict from a data set with `__getitems__`.
        """
        return items if isinstance(items, dict) else default_collate(items)

    @abstractmethod
    def loss(self, network: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensors]:
        """Returns the scalar loss of a batch, and the terms to log.

        Args:
            network: The model as the loop runs it: wrapped, and in the run's precision.
            batch: As `collate` made it, each of its tensors on the device.
        """

    @property
    def trained(self) -> nn.Module:
        """What the loop trains and wraps: the model, or a module that holds it beside what no average has."""
        return self.model

    @abstractmethod
    def write_models(self, folder: Path, weights: Tensors, average: Tensors) -> None:
        """Makes a checkpoint's folder with the model in `model/`, its average in `ema/`, and the like."""

    def restore(self, folder: Path) -> None:
        """Loads what `write_models` wrote in a checkpoint's folder beside the models, to go on with it."""
        return

    @staticmethod
    def filled(config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a plain configuration with the defaults of parts whose options it states in part."""
        return dict(config)

    def contents(self) -> dict[str, Any]:
        """Returns by key of `by_content` what tells the data apart wherever they lie.

        A value is text, or `{"classes": names, "files": {name: size or hash}}`, or None where it is unknown.
        """
        return {}

    def known_contents(self, checkpoint: Path) -> dict[str, Any]:
        """Returns as much of the contents as a checkpoint tells of a run that has kept none."""
        return {}

    def state(self) -> dict[str, Any]:
        """Returns what state.json holds beside the position."""
        return {}

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Returns whether a parameter of `trained` decays, where `optimizer.no_decay` says nothing."""
        return True

    def blocks(self) -> Iterable[nn.Module]:
        """Returns the parts that are compiled one by one; Muon trains their linear layers."""
        return cast(Iterable[nn.Module], self.model.blocks)

    def checkpoint_activations(self) -> None:
        """Makes the model compute its blocks again in the backward pass."""
        self.model.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]

    def forward_flops(self) -> float | None:
        """Returns the FLOPs of one image's forward pass; None where that is unknown."""
        return None

    def frozen_flops(self) -> float:
        """Returns the FLOPs of one image through frozen networks beside the model: their forward passes."""
        return 0.0
