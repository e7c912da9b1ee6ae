"""A folder or file has one writer, whoever dies, forks or removes what."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from flashdit.shared.locks import LOCK, check_no_writer, held, locked_folder, only_writer

ROOT = Path(__file__).parents[3]
HOLDER = """
import os, sys, time
from pathlib import Path
from flashdit.shared.locks import only_writer
with only_writer(Path(sys.argv[1])):
    child = os.fork()
    if not child:
        time.sleep(60)
    print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Returns a process that writes tmp_path/out, and the process that it forked, which lives on."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def test_a_second_writer_is_told_who_the_first_is_until_that_one_is_killed(tmp_path, holder):
    process, child = holder
    who = f"process {process.pid} on host {socket.gethostname()}"
    for check in (lambda path: only_writer(path).__enter__(), check_no_writer):
        with pytest.raises(
            ValueError, match=re.escape(f"out must have one writer at a time, it is written by {who}")
        ):
            check(tmp_path / "out")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5  # by when the child has let go of its copy of the lock
    while time.monotonic() < deadline:
        with suppress(ValueError):
            check_no_writer(tmp_path / "out")
            break
        time.sleep(0.01)
    os.kill(child, 0)  # what the holder forked is still there, as a reader of data for some seconds
    with only_writer(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).read_text().startswith(f"process {os.getpid()} on host ")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_is_locked_beside_it(tmp_path):
    folder = tmp_path / "a" / "b"
    with only_writer(folder / "f.json", is_file=True):
        assert [path.name for path in folder.iterdir()] == [f".f.json{LOCK}"]
        with (
            pytest.raises(ValueError, match="one writer at a time"),
            only_writer(folder / "f.json", is_file=True),
        ):
            pass
        with only_writer(folder / "g.json", is_file=True):
            pass
    assert not (tmp_path / "a").exists()  # both folders were made for the lock alone


def test_who_locks_a_folder_itself_waits_for_whoever_has_it(tmp_path):
    locked = []

    def lock():
        with locked_folder(tmp_path) as mine:
            locked.append(mine)

    other = threading.Thread(target=lock)
    with held(tmp_path) as mine:
        assert mine
        other.start()
        other.join(0.2)
        assert locked == []
        with held(tmp_path) as second:
            assert second is False
    other.join(30)
    assert locked == [True]


def test_a_free_folder_is_left_alone(tmp_path):
    check_no_writer(tmp_path / "absent")
    check_no_writer(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_file_removed_by_its_holder_meanwhile_is_made_again(tmp_path, monkeypatch):
    real, calls = fcntl.flock, []

    def flock(number, how):
        if not calls:
            (tmp_path / LOCK).unlink()  # the holder ends between opening and locking
        calls.append(how)
        real(number, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path):
        assert (tmp_path / LOCK).read_text()
    assert len(calls) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, caplog, number):
    def flock(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path), only_writer(tmp_path / "other"):
        pass
    assert [record.message.partition(" is ")[2] for record in caplog.records] == [
        "on a file system without locks: a second writer is not noticed"
    ] * 2


def test_writers_that_come_at_once_are_never_two(tmp_path):
    code = """
import sys, time
from pathlib import Path
from flashdit.shared.locks import only_writer
folder, mark = Path(sys.argv[1]), Path(sys.argv[1]) / "mark"
for _ in range(300):
    try:
        with only_writer(folder):
            mark.touch(exist_ok=False)
            mark.unlink()
    except ValueError:
        time.sleep(0)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]


def test_a_full_disk_leaves_no_lock_and_no_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match="of what is written"), only_writer(tmp_path / "a" / "run"):
        raise OSError("of what is written")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *a: (refuse if LOCK in str(path) else real)(path, *a))
    with pytest.raises(OSError, match="No space"), only_writer(tmp_path / "a" / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
