"""Files and folders that exist whole or not at all, and what tells one file from another."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object], *, contested: bool = False) -> None:
    """Calls `write` with a temporary name beside `path` (for a file or a folder), then renames.

    A kill leaves what was there before; an existing target is replaced.

    Args:
        path: The file or folder to make; the folders above it are made if need be.
        write: Writes the whole content to the path that it is given.
        contested: Whether several processes may write the same path at once. The temporary name is then this
            process's own, and the next write does not remove what a kill left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid() if contested else 'tmp'}")
    _remove(temporary)
    try:
        write(temporary)
        _follow_umask(temporary)
        if path.is_dir():
            old = path.with_name(f".{path.name}.old")
            _remove(old)
            os.replace(path, old)
            os.replace(temporary, path)
            _remove(old)
        else:
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _follow_umask(path: Path) -> None:
    """Gives files the mode that the umask says; safetensors makes its own readable by nobody else."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
