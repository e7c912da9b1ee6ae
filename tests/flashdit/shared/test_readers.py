"""Processes that read: which signals they heed, and that they do not outlive their parent."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from flashdit.shared.readers import read_batches

ROOT = Path(__file__).parents[3]


class Processes(Dataset):
    """Gives the process that reads."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return os.getpid()


def test_signals_to_a_reader_change_nothing_and_its_parent_ends_it():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    read = read_batches(Processes(), 1, batch_size=1)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    reader = int(next(read))
    numbers = [int(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    code = f"import os\nfor number in {numbers}: os.kill({reader}, number)"  # from another process
    subprocess.run([sys.executable, "-c", code], check=True)
    time.sleep(0.2)
    assert {int(batch) for batch in read} == {reader}
    again = read_batches(Processes(), 1, batch_size=1)
    reader = int(next(again))
    os.kill(reader, signal.SIGTERM)  # as the parent does at its end
    started = time.monotonic()
    while Path(f"/proc/{reader}/stat").read_text().split()[2] not in "ZX" and time.monotonic() - started < 30:
        time.sleep(0.02)
    assert Path(f"/proc/{reader}/stat").read_text().split()[2] in "ZX"
    del again


def test_more_readers_than_cores_are_no_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_batches(Processes(), 3, batch_size=32))) == 2


def test_an_iterator_without_processes_reads_here():
    assert next(read_batches(Processes(), 0, batch_size=2)).equal(torch.tensor([os.getpid()] * 2))


class Breaks(Dataset):
    """Raises an error of one line for every item."""

    def __len__(self):
        return 4

    def __getitem__(self, item):
        raise FileNotFoundError(f"ValueError: item {item} is gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_of_an_error_that_a_worker_reports_the_sentence_is_kept(workers):
    with pytest.raises(FileNotFoundError) as raised:
        list(read_batches(Breaks(), workers, batch_size=1))
    assert str(raised.value) == "ValueError: item 0 is gone"
    assert any("in __getitem__" in note for note in getattr(raised.value, "__notes__", [])) == bool(workers)
