"""What training sees at each position of the endless stream of images: noise, time, dropped labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashdit.shared.seeds import EpochOrder, generator_for


class Latents(Protocol):
    """Latents and labels by index, in memory or in shards."""

    labels: Tensor
    mirrors: bool
    shape: tuple[int, ...]

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Returns VAE latents (B, C, H, W) of rows (B,); `mirrored` (B,) says which mirrors."""
        ...


class Examples(Dataset):
    """Position in the stream → latent, label, noise, time, and whether the label is dropped.

    All that is random about an example comes from (seed, position) alone: batches are the same for any number
    of processes; a resume needs only a position.

    Args:
        data: Latents and labels.
        times: Turns uniform draws into training times.
        seed: The run's seed.
        class_dropout_prob: Share of labels that become null.
        more_draws: How many further uniform draws an example has, as `more` (n,).
        images: Reads the images, uint8 (B, 3, H, W), that an example has as `image`, by rows and by which of
            them are mirrored; None leaves them out.
    """

    def __init__(
        self,
        data: Latents,
        times: Callable[[Tensor], Tensor],
        seed: int,
        class_dropout_prob: float,
        more_draws: int = 0,
        images: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.more_draws, self.images = more_draws, images
        self.data, self.times, self.seed, self.class_dropout_prob = data, times, seed, class_dropout_prob
        self.order = EpochOrder(len(data.labels), seed)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        """Returns latent and noise (C, H, W), and scalars label, time and drop."""
        return {name: values[0] for name, values in self.__getitems__([position]).items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Returns the batch of some positions, read at once: what a DataLoader asks for."""
        indices = torch.tensor([self.order(position) for position in positions])
        uniform, noise = torch.empty(len(indices), 3), torch.empty(len(indices), *self.data.shape)
        for row, position in enumerate(positions):
            generator = generator_for(self.seed, "example", position)
            torch.rand(3, generator=generator, out=uniform[row])
            torch.randn(self.data.shape, generator=generator, out=noise[row])
        mirrored, drop, when = uniform.unbind(1)
        flipped = (mirrored < 0.5) & self.data.mirrors
        batch = {
            "latent": self.data.read(indices, flipped),
            "label": self.data.labels[indices],
            "noise": noise,
            "time": self.times(when),
            "drop": drop < self.class_dropout_prob,
        }
        if self.images is not None:
            batch["image"] = self.images(indices, flipped)
        if self.more_draws:
            generators = (generator_for(self.seed, "more draws", position) for position in positions)
            batch["more"] = torch.stack([torch.rand(self.more_draws, generator=one) for one in generators])
        return batch
