"""What keeps a run alive: steps that are not finite are skipped, and SIGTERM ends it after a checkpoint."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)


class SkipGuard:
    """Counts steps whose gradient is not finite; too many in a row end the run.

    Args:
        most_in_a_row: Skipped steps in a row that end the run.

    Attributes:
        skipped: Steps skipped since the run began.
        in_a_row: Steps skipped since the last good one.
    """

    def __init__(self, most_in_a_row: int):
        self.most_in_a_row = most_in_a_row
        self.skipped = self.in_a_row = 0

    def record(self, healthy: bool, step: int, grad_norm: float) -> None:
        """Counts a step.

        Raises:
            FloatingPointError: If it was one too many that had to be skipped.
        """
        if healthy:
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        logger.warning("step %d skipped: its gradient norm is %s", step, grad_norm)
        if self.in_a_row >= self.most_in_a_row:
            raise FloatingPointError(
                f"the gradient must be finite, got {self.in_a_row} steps in a row up to step {step} where it "
                "was not; the last checkpoint is kept: lower optimizer.lr or check the data"
            )


class TermSignal:
    """Notes a SIGTERM instead of dying of it, while the `with` block runs.

    Attributes:
        received: Whether one came.
    """

    def __enter__(self) -> TermSignal:
        self.received = False
        self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handles the signal."""
        self.received = True
