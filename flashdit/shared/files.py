"""Files and folders that exist whole or not at all, and what tells one file from another.

While FOLDER/NAME is written, its content lies in FOLDER/.NAME.XXXXXXXX.flashdit-tmp/NAME, a temporary
folder that its writer holds locked. A folder that is replaced waits as FOLDER/.NAME.flashdit-old while the
new one takes its name. No file of anybody else's has such a name: `.vimrc.old` is never touched.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flashdit.shared.locks import held, locked_folder

TEMPORARY, REPLACED = ".flashdit-tmp", ".flashdit-old"
LITTLE_ROOM = 2**20
DRAWN = "drawn by flashdit"
"""Text in the files of pictures that commands draw, by which a later one knows that it may replace them."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path (for a file or a folder), then renames; data is on the disk before.

    A kill or a loss of power leaves what was there before; an existing target is replaced. Where the path is
    a link, what it leads to is replaced. Several processes may write one path: what is there is one's whole
    content.

    Args:
        path: The file or folder to make; the folders above it are made if need be.
        write: Writes the whole content to the path that it is given, which has the same name.

    Raises:
        OSError: If it cannot be written, as on a full disk.
    """
    if path.is_symlink():
        path = Path(os.path.realpath(path))
        if path.is_symlink():
            raise OSError(f"{path} must be a file, a folder or new, and is a link that leads to itself")
    path.parent.mkdir(parents=True, exist_ok=True)
    mend(path.parent, path.name)
    with _temporary_folder(path) as folder:
        content = folder / path.name
        try:
            write(content)
            _settle_on_disk(content)
        except (OSError, RuntimeError, SafetensorError) as error:  # the latter two of torch and safetensors
            if lost_worker(error):
                raise
            why = ", the disk is full" if _is_full(error, folder) else ""
            raise OSError(f"{path} could not be written{why}: {error}") from error
        with locked_folder(path.parent):
            old = path.with_name(f".{path.name}{REPLACED}")
            is_folder = path.is_dir()
            if is_folder and not content.is_dir():
                raise IsADirectoryError(f"{path} must be a file, and there is a folder of that name")
            if is_folder:
                os.replace(path, old)
                try:
                    os.replace(content, path)
                except BaseException:
                    os.replace(old, path)
                    raise
            else:
                os.replace(content, path)
            sync(path.parent)
        if is_folder:
            discard(old)


def discard(path: Path) -> None:
    """Removes a file or folder that a kill leaves whole, or as a temporary one that `mend` removes."""
    with _temporary_folder(path) as folder, suppress(FileNotFoundError):  # another process was faster
        os.replace(path, folder / path.name)
        sync(path.parent)


def mend(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers left in a folder, and completes or undoes a replacement they began.

    Args:
        folder: Where to look, not below it; it need not exist.
        name: Of the one file or folder that is mended; None means all.
    """
    pattern = "*" if name is None else glob.escape(name)
    replaced = list(folder.glob(f".{pattern}{REPLACED}"))
    if replaced:
        with locked_folder(folder):
            for old in replaced:
                target = folder / old.name[1 : -len(REPLACED)]
                if old.exists() and not target.exists():
                    os.replace(old, target)
        for old in replaced:
            discard(old)
    for leftover in folder.glob(f".{pattern}.*{TEMPORARY}"):
        try:
            with held(leftover) as free:
                if free:
                    _remove(leftover)
        except FileNotFoundError:  # another process was faster
            continue


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically; NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


OWN_CHECKSUM = "crc32_of_the_rest"
"""Key of a JSON file that tells whether the rest is as it was written; without it nothing is compared."""


def write_checked_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping as `write_json` does, with the checksum that `read_checked_json` compares."""
    write_json(path, {**content, OWN_CHECKSUM: _json_crc32(content)})


def read_checked_json(path: Path) -> dict[str, Any]:
    """Returns the mapping that a JSON file holds, without its checksum.

    Raises:
        ValueError: If it is no JSON, no mapping, or not what was written.
    """
    try:
        content = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError("its parts lie too deep in one another") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a mapping, got {type(content).__name__}")
    written = content.pop(OWN_CHECKSUM, None)
    if written is not None and written != _json_crc32(content):
        raise ValueError(
            f"its checksum is not the one that it was written with (without its line {OWN_CHECKSUM} it is "
            "taken as it is)"
        )
    return content


def _json_crc32(content: Any) -> str:
    """Returns the CRC-32 of what JSON says, however it is laid out, as hexadecimal digits."""
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_sha256(folders: Iterable[Path]) -> str:
    """Returns the SHA-256 of the Python files below folders as hexadecimal digits."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def file_crc32(path: Path) -> str:
    """Returns the CRC-32 of a file as hexadecimal digits: four times as fast as SHA-256, against damage."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"


def lost_worker(error: BaseException | None) -> str | None:
    """Returns what torch says of a killed process of a data loader, which it raises wherever the code is.

    Args:
        error: Looked for in it and in those that it came of.
    """
    while error is not None:
        if "DataLoader worker" in str(error):
            return " ".join(str(error).split())
        error = error.__cause__ or error.__context__
    return None


def _is_full(error: Exception, folder: Path) -> bool:
    """Returns whether a write failed for want of room; torch and safetensors give no error number."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return os.strerror(errno.ENOSPC) in str(error) or shutil.disk_usage(folder).free < LITTLE_ROOM


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder beside a path, held locked, and removes it with what is left in it."""
    prefix = f".{path.name.removeprefix('.')}."
    with ExitStack() as stack:
        mine: bool | None = False
        folder = path
        while mine is False:  # taken for a leftover before it was locked
            folder = Path(tempfile.mkdtemp(suffix=TEMPORARY, prefix=prefix, dir=path.parent))
            with suppress(FileNotFoundError):
                mine = stack.enter_context(held(folder))
            mine = mine if folder.exists() else False
        try:
            yield folder
        finally:
            _remove(folder)


def _settle_on_disk(path: Path) -> None:
    """Writes a file or folder through to the disk, its files with the mode that the umask says.

    safetensors makes its own readable by nobody else.
    """
    umask = os.umask(0)
    os.umask(umask)
    for part in [path, *path.rglob("*")]:
        if part.is_file() and not part.is_symlink():
            part.chmod(0o666 & ~umask)
        sync(part)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems refuse it for folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
