"""Which positions of the stream of images each process takes, and how examples become a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import default_collate

from flashdit.training.task import Tensors


def as_batch(items: Any) -> Tensors:
    """Returns a batch: some data sets make it at once, others give its examples."""
    return items if isinstance(items, dict) else default_collate(items)


def positions(
    start: int, updates: int, batch_size: int, accumulation: int, rank: int, ranks: int
) -> Iterator[range]:
    """Yields the positions of each batch of one process, in order.

    Args:
        start: Images seen before.
        updates: Optimiser steps to come.
        batch_size: Images of one process in one accumulated part.
        accumulation: Parts of an optimiser step.
        rank: This process.
        ranks: How many processes there are.
    """
    parts = range(rank, updates * accumulation * ranks, ranks)
    return (range(start + part * batch_size, start + (part + 1) * batch_size) for part in parts)
