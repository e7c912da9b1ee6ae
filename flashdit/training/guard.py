"""What keeps a run's work: steps that are not finite are skipped, and signals end it after a checkpoint."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)
STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
LAUNCHED = "TORCHELASTIC_RUN_ID"
HOPELESS = 3
"""Skipped steps in a row at the end of a run that make it a failed one; fp16 skips one now and then."""
ECHO_S = 5.0
"""Seconds in which a launcher hands on a Ctrl-C that the terminal has sent to all processes itself."""


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

    def check_end(self, weights: Iterable[Tensor]) -> None:
        """Raises FloatingPointError if training ended in skipped steps that nothing would have mended."""
        if self.in_a_row and (
            self.in_a_row >= HOPELESS or not all(bool(weight.isfinite().all()) for weight in weights)
        ):
            raise FloatingPointError(
                f"the gradient must be finite at the end, got {self.in_a_row} skipped steps in a row: start "
                "again from an earlier checkpoint, with a lower optimizer.lr"
            )


class Stopped(BaseException):
    """Ends what may be left out when the run is to stop; nothing that catches errors catches it."""


class StopSignals:
    """Notes signals that end a run, instead of dying of them, while the `with` block runs.

    Those that were ignored when the process started (nohup) stay ignored. A second Ctrl-C ends the process at
    once, with exit status 130.

    Args:
        speaks: Whether this process says that it was told to stop.

    Attributes:
        received: Name of the first signal that came; None before.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks
        self.received: str | None = None
        self.raises = False
        self.interrupted_s: float | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        known = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
        in_main = threading.current_thread() is threading.main_thread()  # others get no signals
        for number in known if in_main else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def ending(self, allowed: bool) -> Iterator[None]:
        """Runs what a signal may end.

        Args:
            allowed: Whether it may.

        Raises:
            Stopped: If a signal came before or meanwhile, and it may.
        """
        self.raises = allowed
        try:
            if self.received and allowed:
                raise Stopped
            yield
        finally:
            self.raises = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted_s is None:
                self.interrupted_s = now
            elif now - self.interrupted_s > (ECHO_S if LAUNCHED in os.environ else 0):
                _abort()
        if self.received is None:
            self.received = signal.Signals(number).name
            if self.speaks:
                _say(f"{self.received}: the run is saved and ends; a second Ctrl-C ends it at once, unsaved")
            if self.raises:
                raise Stopped


def _say(sentence: str) -> None:
    """Writes a line to stderr, in a way that is allowed within any other write."""
    os.write(2, f"\n{sentence}\n".encode())


def _abort() -> None:
    """Ends the process and those that read for it at once."""
    _say("ended at once by a second Ctrl-C: what is newer than the last whole checkpoint, if any, is lost")
    for child in multiprocessing.active_children():
        child.terminate()
    os._exit(130)
