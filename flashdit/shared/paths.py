"""Paths as users write them: what `~` and variables stand for, what may be written, how one is shown."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import tempfile
from pathlib import Path

# control codes, breaks and directions
CONTROL_CODES = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expanded(text: str) -> str:
    """Returns a path with the home folder for `~` at its beginning, and the values of `$NAME` and `${NAME}`.

    A file or folder whose own name has a `$` comes first.

    Raises:
        ValueError: If a variable is not set; names it.
    """

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} must be set for {text}")
        return os.environ[name]

    parts: list[str] = []
    for part in os.path.expanduser(text).split(os.sep):
        is_name = VARIABLE.search(part) and os.path.lexists(os.sep.join([*parts, part]))
        parts.append(part if is_name else VARIABLE.sub(value, part))
    return os.path.expanduser(os.sep.join(parts))


def resolved(path: Path | str) -> Path:
    """Returns an absolute path with its links followed; unlike `Path.resolve`, a link to itself as it is."""
    return Path(os.path.realpath(path))


def check_length(path: Path | str, called: str) -> None:
    """Raises ValueError for a name that is longer than its file system takes; `called` names the path."""
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{called} must be a shorter path, got {path}: {error.strerror}") from error


def check_writable(path: Path, called: str) -> None:
    """Raises ValueError unless a file can be made where a path will lie; nothing stays of the attempt.

    Args:
        path: A folder, or one that will be made, as those above it.
        called: What names it, for the message.
    """
    rule = f"{called} must be where files can be written, got {path}"
    try:
        for place in (path, *path.parents):
            if place.is_symlink() and not place.exists():
                raise ValueError(f"{rule}: {place} is a link to nothing")
        with tempfile.TemporaryFile(dir=nearest(path)):
            pass
    except OSError as error:
        raise ValueError(f"{rule}: {error.strerror}") from error


def check_disk(path: Path, needed: float, called: str, what: str) -> None:
    """Raises ValueError if a disk has not so many bytes left.

    Args:
        path: What will lie there; it need not exist.
        needed: Bytes.
        called: What names the path, for the message.
        what: Takes the bytes, likewise.
    """
    free = shutil.disk_usage(nearest(path)).free
    if free < needed:
        given, wanted = (f"{size / 2**30:,.4g} GiB" for size in (free, needed))
        raise ValueError(f"{called} needs room for {what}, {wanted}, got {given} free for {path}")


def nearest(path: Path) -> Path:
    """Returns a path itself if it is there, else the nearest folder above it that is."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def check_outside(path: Path, images: Path | str | None, called: str, owner: str) -> None:
    """Refuses what would be written into a folder of images, and be an image or a class of it from then on.

    Args:
        path: What will be written.
        images: The folder; None where there is none.
        called: What names the path, for the message.
        owner: Whose the images are, likewise.

    Raises:
        ValueError: If the path lies in the folder.
    """
    if images is not None and resolved(path).is_relative_to(resolved(images)):
        raise ValueError(f"{called} must not lie in the images of {owner}, {images}, got {path}")


def check_replaceable(path: Path, mark: str, called: str) -> None:
    """Refuses to replace a file of another kind, such as a photograph or a configuration, or a folder.

    Args:
        path: The file that will be written; it need not exist.
        mark: A text that all files of its kind hold.
        called: What names it, for the message.

    Raises:
        ValueError: If there is something else under its name; an empty file may be replaced.
    """
    if not path.exists():
        return
    if path.is_file() and not path.stat().st_size:
        return
    if path.is_file():
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(mark.encode()) >= 0:
                return
    raise ValueError(
        f"{called} must be a new file or an earlier one of the same kind, which is replaced, got {path}: "
        "give another name, or remove it"
    )


def is_utf8(text: str) -> bool:
    """Returns whether a text can be written as UTF-8; bytes of a path that cannot are surrogates in it."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def printable(text: object) -> str:
    """Returns a text on one line: line breaks, terminal codes and bytes that are no UTF-8 are escaped."""
    shown = CONTROL_CODES.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
    return shown.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
