"""One writer at a time: locks of the kernel, which are free again once their holder ends or is killed."""

from __future__ import annotations

import errno
import logging
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from flashdit.shared.paths import check_replaceable, check_writable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)
LOCK = ".flashdit-lock"
"""The lock file in a folder that has one writer."""
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # EBADF: a folder on NFS


class _Descriptor:
    """An open file that processes forked from this one close, so that they do not keep its lock."""

    opened: ClassVar[weakref.WeakSet[_Descriptor]] = weakref.WeakSet()

    def __init__(self, path: Path, flags: int):
        self.number: int | None = os.open(path, flags, 0o666)
        self.opened.add(self)

    def close(self) -> None:
        """Closes the file, which frees its lock."""
        if self.number is not None:
            os.close(self.number)
            self.number = None

    @classmethod
    def close_all(cls) -> None:
        """Closes every open one; a forked process calls it."""
        for descriptor in list(cls.opened):
            descriptor.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Descriptor.close_all)


def try_lock(descriptor: _Descriptor, *, wait: bool = False) -> bool | None:
    """Locks an open file; returns whether it is this process's now, None where there are no locks."""
    if fcntl is None or descriptor.number is None:
        return None
    try:
        fcntl.flock(descriptor.number, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool | None]:
    """Waits for the lock of a folder itself, and gives what `try_lock` does."""
    descriptor = _Descriptor(folder, os.O_RDONLY)
    try:
        yield try_lock(descriptor, wait=True)
    finally:
        descriptor.close()


@contextmanager
def held(path: Path) -> Iterator[bool | None]:
    """Locks a file or folder that is there without waiting, and gives what `try_lock` does."""
    descriptor = _Descriptor(path, os.O_RDONLY)
    try:
        yield try_lock(descriptor)
    finally:
        descriptor.close()


@contextmanager
def only_writer(
    target: Path, *, is_file: bool = False, mark: str | None = None, called: str = "--output"
) -> Iterator[None]:
    """Runs as the only writer of a folder or an output file.

    The lock file holds the writer's host and process. It is `.flashdit-lock` in the folder, which is made if
    need be, or `.NAME.flashdit-lock` beside the file, and is removed at the end. Folders that were made for
    it and stay empty are removed too.

    Args:
        target: The folder or file.
        is_file: Whether it is a file, or a folder that is replaced as a whole.
        mark: Of a file that may be replaced alone by one of its kind: what `check_replaceable` takes.
        called: What names it, for messages.

    Raises:
        ValueError: If nothing can be written there, another process writes it, or it is of another kind.
    """
    path = target.with_name(f".{target.name}{LOCK}") if is_file else target / LOCK
    check_writable(path.parent, called)
    if mark is not None:
        check_replaceable(target, mark, called)
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _take(path, target)
        try:
            yield
        finally:
            if descriptor.number is not None:  # not in a forked process
                path.unlink(missing_ok=True)
                descriptor.close()
    finally:
        with suppress(OSError):  # something was written, or in a forked process the lock is still there
            for folder in made:
                folder.rmdir()


def check_no_writer(folder: Path) -> None:
    """Raises ValueError if another process writes a run's folder; it need not exist."""
    if (folder / LOCK).exists():
        with only_writer(folder, called="run.dir"):
            pass


def _take(path: Path, target: Path) -> _Descriptor:
    """Returns the open and locked lock file, with this host and process in it."""
    while True:
        descriptor = _Descriptor(path, os.O_RDWR | os.O_CREAT)
        number = descriptor.number
        assert number is not None
        taken = try_lock(descriptor)
        if taken is False:
            descriptor.close()
            raise ValueError(f"{target} must have one writer at a time, it is written by {_holder(path)}")
        if taken is None:
            logger.warning("%s is on a file system without locks: a second writer is not noticed", target)
        try:
            same = os.path.samestat(os.fstat(number), path.stat())
        except FileNotFoundError:
            same = False
        if same:  # otherwise its last holder removed it between opening and locking
            os.ftruncate(number, 0)
            with suppress(OSError):  # the disk is full, which what is written next will tell; the lock holds
                os.write(number, f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
            return descriptor
        descriptor.close()


def _holder(path: Path) -> str:
    """Returns what the lock file says of its holder."""
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
