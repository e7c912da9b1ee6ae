"""Which positions of the stream of images each process takes, and how they become the batches of a step."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any


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


class StepBatches:
    """The batches of each optimiser step, read while the step before can still be saved.

    A file that has gone ends a run then as a signal does: with a checkpoint, on all processes at one step.

    Args:
        batches: Of this process, in order.
        accumulation: Batches of a step.

    Attributes:
        parts: Those of the next step.
        failure: Why they could not be read; None while they could.
    """

    def __init__(self, batches: Iterator[Any], accumulation: int):
        self.batches, self.accumulation = batches, accumulation
        self.parts: list[Any] = []
        self.failure: ValueError | OSError | None = None

    def read(self) -> None:
        """Reads the batches of the next step; none are left after the last one."""
        try:
            self.parts = list(islice(self.batches, self.accumulation))
        except (ValueError, OSError) as error:
            self.failure = error
