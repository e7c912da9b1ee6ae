"""What training sees at each position of the endless stream of images, and who takes which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashdit.seeds import generator_for


class Latents(Protocol):
    """Latents and labels by index, in memory or in shards."""

    labels: Tensor
    mirrors: bool

    def latent(self, index: int, mirrored: bool = False) -> Tensor:
        """Returns one VAE latent (C, H, W)."""
        ...


class Examples(Dataset):
    """Position in the stream → latent, label, noise, time, and whether the label is dropped.

    Every epoch is a permutation by (seed, epoch), and all that is random about an example comes from
    (seed, position) alone: batches are the same for any number of processes; a resume needs only a position.

    Args:
        data: Latents and labels.
        times: Turns uniform draws into training times.
        seed: The run's seed.
        class_dropout_prob: Share of labels that become null.
    """

    def __init__(
        self, data: Latents, times: Callable[[Tensor], Tensor], seed: int, class_dropout_prob: float
    ):
        self.data, self.times, self.seed, self.class_dropout_prob = data, times, seed, class_dropout_prob
        self.size = len(data.labels)
        self.epoch, self.order = -1, torch.empty(0)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Returns latent and noise (C, H, W), and scalars label, time and drop."""
        index = self.index(position)
        generator = generator_for(self.seed, "example", position)
        mirrored, drop, when = torch.rand(3, generator=generator)
        latent = self.data.latent(index, bool(self.data.mirrors and mirrored < 0.5))
        return {
            "latent": latent,
            "label": self.data.labels[index],
            "noise": torch.randn(latent.shape, generator=generator),
            "time": self.times(when),
            "drop": drop < self.class_dropout_prob,
        }

    def index(self, position: int) -> int:
        """Returns which image stands at a position of the stream."""
        epoch, place = divmod(position, self.size)
        if epoch != self.epoch:
            self.order = torch.randperm(self.size, generator=generator_for(self.seed, "order", epoch))
            self.epoch = epoch
        return int(self.order[place])


def positions(
    start: int, updates: int, batch_size: int, accumulation: int, rank: int, ranks: int
) -> list[range]:
    """Returns the positions of each batch of one process, in order.

    Args:
        start: Images seen before.
        updates: Optimiser steps to come.
        batch_size: Images of one process in one accumulated part.
        accumulation: Parts of an optimiser step.
        rank: This process.
        ranks: How many processes there are.
    """
    parts = range(rank, updates * accumulation * ranks, ranks)
    return [range(start + part * batch_size, start + (part + 1) * batch_size) for part in parts]
