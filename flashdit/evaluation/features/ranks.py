"""One evaluation on several processes: who does which share, and how a failure on one reaches all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flashdit.shared.process import check_processes

Shared = TypeVar("Shared")

RANKS_TIMEOUT = timedelta(
    hours=24
)  # for the slowest process; one that dies is noticed by the launcher, not by time


class Ranks:
    """The processes of an evaluation; without arguments, this one alone.

    What is exchanged travels through gloo on the CPU, so that nothing depends on the device of the features.

    Args:
        rank: Which process this is.
        world: How many there are.
        group: Their gloo group; None for one process.
    """

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None):
        self.rank, self.world, self.group = rank, world, group

    @classmethod
    def start(cls, device: str = "cpu") -> Ranks:
        """Returns the processes that `accelerate launch` or torchrun started, or this one alone."""
        from accelerate import PartialState  # a second to import

        state = PartialState(cpu=torch.device(device).type == "cpu")
        check_processes(state.num_processes)
        if state.num_processes == 1:
            return cls()
        group = dist.new_group(backend="gloo", timeout=RANKS_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        return cls(state.process_index, state.num_processes, group)

    def stop(self) -> None:
        """Leaves the process group, if there is one."""
        if self.group is not None:
            dist.destroy_process_group()
            self.group = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that solves and writes."""
        return self.rank == 0

    def share(self, count: int) -> Tensor:
        """Returns which of `count` images are this process's: every world-th, and each one's exactly once."""
        return torch.arange(self.rank, count, self.world)

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Runs work that exchanges nothing; where it fails on one process, all of them raise.

        Raises:
            ValueError: On the processes where it did not fail, naming the one where it did.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self._gather_all(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"process {rank}: {message}")

    def broadcast(self, value: Shared) -> Shared:
        """Returns the main process's value."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def from_others(self, value: Shared) -> Iterator[Shared]:
        """Yields, on the main process, the values of the others in order, one in memory at a time."""
        if self.group is None:
            return
        if not self.is_main:
            dist.send_object_list([value], dst=0, group=self.group)
            return
        for rank in range(1, self.world):
            received: list[Any] = [None]
            dist.recv_object_list(received, src=rank, group=self.group)
            yield received[0]

    def _gather_all(self, value: Shared) -> list[Shared]:
        """Returns every process's value, in order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextmanager
def processes(device: str) -> Iterator[Ranks]:
    """Joins a script to the other processes, if any; of what fails on all of them, the main one tells."""
    ranks = Ranks.start(device)
    try:
        yield ranks
    except (ValueError, OSError):
        if not ranks.is_main:
            sys.exit(2)
        raise
    finally:
        ranks.stop()
