"""What readers of images share: reading in advance, and the number of images."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

Batches = Generator[Tensor, None, None]
BALANCED = "balanced"


def prefetched(batches: Batches) -> Batches:
    """Yields the same batches, each read by a thread while the one before it is used."""
    try:
        with ThreadPoolExecutor(1) as thread:
            upcoming = thread.submit(next, batches, None)
            while (batch := upcoming.result()) is not None:
                upcoming = thread.submit(next, batches, None)
                yield batch
    finally:
        batches.close()  # and with it the file, where the reader stopped half-way


def label_mode(labels: Tensor | None, told: str | None = None) -> str | None:
    """Returns whether every class that occurs does so equally often (± 1), which moves FID.

    Args:
        labels: None where there are none.
        told: What is said instead of labels that are not balanced: how they came about.
    """
    if labels is None:
        return None
    counts = labels.unique(return_counts=True)[1]
    return BALANCED if int(counts.max() - counts.min()) <= 1 else told or "not balanced"


def limited(count: int, limit: int | None, path: Path) -> int:
    """Returns the number of images to read; raises ValueError for more than there are."""
    if limit is not None and not 1 <= limit <= count:
        raise ValueError(f"the number of images must be 1 to the {count} in {path}, got {limit}")
    return count if limit is None else limit
