"""A run whose every step is on record, on latents that tell which image they are."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdit import config
from flashdit.data.shards import write_shard, write_statistics
from flashdit.trainer import FlashDiTTask
from flashdit.training.accelerator import start_run
from flashdit.training.loop import TrainingLoop


@dataclass(kw_only=True)
class KnownData:
    """What the shards hold: 20 + 17 images, (N, 3, 4, 4), no two alike, labels in no order."""

    folder: Path
    latents: Tensor
    mirrored: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def rows(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which image each latent (B, C, H, W) is, and whether it is the mirrored one."""
        both = torch.cat([self.latents, self.mirrored])
        same = (latents[:, None] == both[None]).flatten(2).all(2)
        assert same.sum(1).eq(1).all(), "a latent of the batch is none of the stored ones"
        found = same.int().argmax(1)
        return found % len(self.latents), found >= len(self.latents)


@pytest.fixture(scope="session")
def known(tmp_path_factory):
    """Returns the shards and what they hold; the statistics are no channel's 0 and 1."""
    folder = tmp_path_factory.mktemp("known")
    draws = torch.Generator().manual_seed(5)
    mean = torch.tensor([2.0, -1.0, 0.5]).reshape(1, 3, 1, 1)
    std = torch.tensor([3.0, 0.5, 1.25]).reshape(1, 3, 1, 1)
    latents, mirrored = mean + std * torch.randn(2, 37, 3, 4, 4, generator=draws)
    labels = torch.randint(3, (37,), generator=draws)
    for number, rows in enumerate((slice(0, 20), slice(20, 37))):
        write_shard(folder, 0, number, latents[rows], mirrored[rows], labels[rows])
    write_statistics(folder, mean, std)
    return KnownData(folder=folder, latents=latents, mirrored=mirrored, labels=labels, mean=mean, std=std)


@dataclass(kw_only=True)
class Part:
    """One forward and backward pass: what went in, what the model was given, what came out."""

    step: int
    batch: dict[str, Tensor]
    given: dict[str, Any] = field(default_factory=dict)
    v_t: Tensor = field(default_factory=lambda: torch.empty(0))
    embedded: Tensor = field(default_factory=lambda: torch.empty(0))
    table: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: float = 0.0


class Recorded:
    """The real loop and task, recorded from outside: hooks on the model, and the loss that goes backward."""

    poisoned_steps: tuple[int, ...] = ()

    def __init__(self, run_config):
        accelerator = start_run(run_config, FlashDiTTask)
        self.task = FlashDiTTask(run_config, accelerator)
        self._move_off_zeros()
        self.loop = TrainingLoop(run_config, self.task, accelerator)
        self.parts: list[Part] = []
        self.initial = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.register_forward_hook(self._note_forward, with_kwargs=True)
        self.model.y_embedder.register_forward_hook(self._note_labels)
        self.backward, accelerator.backward = accelerator.backward, self._note_backward
        self.loss, self.task.loss = self.task.loss, self._note_loss

    def __getattr__(self, name):
        return getattr(self.loop, name)

    def _move_off_zeros(self):
        """Changes the fresh model, where signs and scales of the output would not show."""
        draws = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in self.task.model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))

    def _note_loss(self, network, batch):
        """Notes the batch as it comes."""
        copy = {name: value.clone() for name, value in batch.items()}
        self.parts.append(Part(step=self.step, batch=copy))
        loss, terms = self.loss(network, batch)
        return (loss * torch.nan if self.step in self.poisoned_steps else loss), terms

    def listening(self):
        """Returns whether the forward pass is one of training."""
        return torch.is_grad_enabled()

    def _note_forward(self, model, arguments, named, output):
        if self.listening():
            self.parts[-1].given = inspect.signature(model.forward).bind(*arguments, **named).arguments
            self.parts[-1].v_t = output.detach().clone()

    def _note_labels(self, embedder, arguments, output):
        if self.listening():
            self.parts[-1].embedded = output.detach().clone()
            self.parts[-1].table = embedder.embedding_table.weight.detach().clone()

    def _note_backward(self, loss, **options):
        self.parts[-1].loss = loss.item()
        self.backward(loss, **options)

    def stream(self, name):
        """Returns one entry of all batches, in the order of the stream."""
        return torch.cat([part.batch[name] for part in self.parts])


@pytest.fixture(scope="session")
def make_recorded(known, tmp_path_factory):
    """Returns a function that makes a recorded trainer with further overrides, not yet run."""

    def make(*overrides: str, times: str = "{name: logit_normal, mean: -0.6, std: 1.4}") -> Recorded:
        tiny = [
            f"run.dir={tmp_path_factory.mktemp('objective') / 'run'}",
            *("data.name=shards", f"data.path={known.folder}"),
            *("latents.vae=null", "latents.multiplier=0.75"),
            *("model.sample_size=4", "model.patch_size=1", "model.in_channels=3", "model.num_classes=3"),
            *("model.hidden_size=16", "model.depth=1", "model.class_dropout_prob=0.3"),
            *(f"flow.times={times}", "flow.loss.cosine_weight=0.7"),
            *("training.steps=6", "training.global_batch_size=8"),
            *("training.save_every=100", "training.log_every=1"),
        ]
        return Recorded(config.load(None, [*tiny, *overrides]))

    return make
