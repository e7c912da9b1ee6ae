"""One seed, one result: a random generator for each named purpose and item, whatever the batch or process."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def check_seed(seed: int, called: str) -> None:
    """Raises ValueError for a seed that is negative or larger than torch takes; `called` names it."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"{called} must be from 0 to below 2^63, got {seed}")


def generator_for(seed: int, purpose: str, item: int) -> torch.Generator:
    """Returns a CPU generator that depends on these three alone.

    Args:
        seed: The run's or the sampler's seed, not negative.
        purpose: What is drawn, such as `"noise"`: two purposes never share a stream.
        item: Which sample, epoch or batch.
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), item])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


class EpochOrder:
    """Position in the stream → which image stands there: every epoch is a permutation by (seed, epoch).

    Args:
        size: Images of an epoch.
        seed: The run's.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.epoch, self.permutation = -1, torch.empty(0)

    def __call__(self, position: int) -> int:
        """Returns the row of the image at a position."""
        epoch, place = divmod(position, self.size)
        if epoch != self.epoch:
            self.permutation = torch.randperm(self.size, generator=generator_for(self.seed, "order", epoch))
            self.epoch = epoch
        return int(self.permutation[place])
