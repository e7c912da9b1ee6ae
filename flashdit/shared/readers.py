"""Batches read by worker processes, which leave the signals of a terminal or a scheduler to their parent."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, Dataset

MOST_WORKERS = 256
LEFT_TO_PARENT = {
    getattr(signal, name)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", *(("SIGTERM",) if hasattr(signal, "sigwaitinfo") else ()))
    if hasattr(signal, name)
}
"""What a terminal or a scheduler sends to all processes of a job; workers that died of it would end a run
before it is saved."""


def check_workers(workers: int, called: str) -> None:
    """Raises ValueError for a number of reading processes that no machine has; `called` names it."""
    if not 0 <= workers <= MOST_WORKERS:
        raise ValueError(f"{called} must be from 0 to {MOST_WORKERS}, got {workers}")


def read_batches(examples: Dataset, workers: int, **options: Any) -> Iterator[Any]:
    """Returns the batches of a data loader; its processes are started now.

    Args:
        examples: What is read.
        workers: Processes that read; more than there are cores are of use where files come slowly, so
            PyTorch's warning about it is not shown.
        **options: Of torch's DataLoader.
    """
    with _signals_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        start = _leave_signals_to_parent if workers else None
        loader = DataLoader(examples, num_workers=workers, worker_init_fn=start, **options)
        return _with_plain_errors(iter(loader))


def _with_plain_errors(batches: Iterator[Any]) -> Iterator[Any]:
    """Yields batches; of an error that a worker reports with its traceback, the sentence is kept."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        if (report := str(error)).startswith("Caught "):
            error.args = (report.rpartition(f"{type(error).__name__}: ")[2].strip(),)
            error.add_note(report)
        raise


@contextmanager
def _signals_held() -> Iterator[None]:
    """Holds signals back until the block has ended; processes started in it inherit that and keep it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(worker: int) -> None:
    """Blocks the signals in a worker, but ends it at a SIGTERM that its parent sends."""
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, LEFT_TO_PARENT)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(parent: int) -> None:
    """Waits for a SIGTERM of the parent, and ends this process."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM})
        if sender is not None and sender.si_pid == parent:
            os._exit(0)
