"""Images of a folder in batches, those left out and named that cannot be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flashdit.data.sources import PixelSource


@dataclass
class ReadBatch:
    """What became of some rows of a source."""

    rows: list[int]
    """Those that could be read, in order."""
    images: Tensor | None
    """Of these rows, uint8 (B, 3, S, S); None if there is none."""
    unreadable: dict[int, str]
    """Why the others could not be read, by row."""


class ReadableImages(Dataset):
    """Rows → ReadBatch; an item is a batch, so a data loader takes `batch_size=None` and batches as sampler.

    Args:
        source: The images.
    """

    def __init__(self, source: PixelSource):
        self.source = source

    def __getitem__(self, rows: Sequence[int]) -> ReadBatch:
        """Returns the images of some rows."""
        images, unreadable = {}, {}
        for row in rows:
            try:
                images[row] = self.source.image(row)
            except MemoryError:
                raise
            except Exception as error:  # decoders raise SyntaxError, struct.error and others on a broken file
                unreadable[row] = str(error.__cause__ or error)
        stacked = torch.stack([*images.values()]) if images else None
        return ReadBatch(list(images), stacked, unreadable)
