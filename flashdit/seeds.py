"""One seed, one result: a random generator for each named purpose and item, whatever the batch or process."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def generator_for(seed: int, purpose: str, item: int) -> torch.Generator:
    """Returns a CPU generator that depends on these three alone.

    Args:
        seed: The run's or the sampler's seed, not negative.
        purpose: What is drawn, such as `"noise"`: two purposes never share a stream.
        item: Which sample, epoch or batch.
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), item])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
