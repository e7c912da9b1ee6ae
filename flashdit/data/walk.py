"""What lies below a folder: images by class, and what is left out of them and why."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import features

from flashdit.shared.paths import is_utf8, printable, resolved

OPTIONAL = {"avif": ("AVIF", ".avif"), "jpg_2000": ("JPEG2000", ".jp2")}  # where Pillow was built with them
DECODERS = [names for feature, names in OPTIONAL.items() if features.check(feature)]
IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(name for name, _ in DECODERS)]
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {suffix for _, suffix in DECODERS}
)
NOT_DATA = {"__MACOSX", "@eaDir"}  # what archives and file servers leave behind, beside names with a dot


class Walk:
    """One walk below a root: what it has left out so far.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path):
        self.root, self.links = root, 0
        self.left_out: Counter[str] = Counter()
        self.unreadable: dict[str, str] = {}
        whole = resolved(root)
        self.above = frozenset(_identity(folder.stat()) for folder in (whole, *whole.parents))

    def name(self, path: str) -> str:
        """Returns an entry's name below the root, as it is stored and shown."""
        return printable(os.path.relpath(path, self.root).replace(os.sep, "/"))

    def visible(self, folder: str, wanted: Sequence[str] = ()) -> list[tuple[str, os.stat_result]]:
        """Returns path and state of each entry that is not hidden; links are followed, broken ones noted."""
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(
                f"every folder of images must be readable, {printable(folder)} is not: {error.strerror}"
            ) from error
        kept = []
        for entry in found:
            if (entry.name.startswith(".") or entry.name in NOT_DATA) and entry.name not in wanted:
                self.left_out["hidden"] += 1
                continue
            try:
                kept.append((entry.path, entry.stat()))
                self.links += entry.is_symlink()
            except OSError as error:
                link = "a link to nothing" if isinstance(error, FileNotFoundError) else error.strerror
                self.unreadable[self.name(entry.path)] = link or str(error)
        return kept

    def is_image(self, path: str, about: os.stat_result) -> bool:
        """Returns whether a file is an image by its name; what is none is noted."""
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in IMAGE_SUFFIXES:
            self.left_out[printable(suffix) or "without suffix"] += 1
        elif not stat.S_ISREG(about.st_mode):
            self.unreadable[self.name(path)] = "it is no regular file"
        elif not is_utf8(path):
            self.unreadable[self.name(path)] = "its name is not UTF-8"
        else:
            return True
        return False

    def images(self, folder: str, about: os.stat_result) -> list[tuple[str, int]]:
        """Returns path and bytes of the images of a folder at any depth, ordered by the parts of the path."""
        found, waiting = [], [(folder, self.above | {_identity(about)})]
        while waiting:
            here, above = waiting.pop()
            for path, state in self.visible(here):
                if not stat.S_ISDIR(state.st_mode):
                    found += [(path, state.st_size)] if self.is_image(path, state) else []
                elif _identity(state) in above:
                    self.unreadable[self.name(path)] = "a link to a folder that it lies in"
                else:
                    waiting.append((path, above | {_identity(state)}))
        return sorted(found, key=lambda item: item[0].split(os.sep))

    def folders(self, wanted: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
        """Returns the images of each class, by name, in natural order; without sub-folders there is one."""
        entries = self.visible(str(self.root), wanted)
        folders = [(path, state) for path, state in entries if stat.S_ISDIR(state.st_mode)]
        files = [item for item in entries if not stat.S_ISDIR(item[1].st_mode)]
        direct = [(path, state.st_size) for path, state in files if self.is_image(path, state)]
        if not folders:
            return {wanted[0] if len(wanted) == 1 else resolved(self.root).name: direct}
        if direct:
            self.left_out[f"loose beside the class folder{'s' * (len(folders) > 1)}"] += len(direct)
        classes = {}
        for path, state in sorted(folders, key=lambda item: natural_key(os.path.basename(item[0]))):
            if _identity(state) in self.above:
                self.unreadable[self.name(path)] = "a link to a folder that it lies in"
            elif not is_utf8(path):
                raise ValueError(f"the name of a class folder must be UTF-8, got {printable(path)}")
            else:
                classes[os.path.basename(path)] = self.images(path, state)
        return classes


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Returns a sort key that has 2 before 10, and upper and lower case side by side."""
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def _identity(about: os.stat_result) -> tuple[int, int]:
    """Returns what tells a folder apart from all others, whatever path leads to it."""
    return about.st_dev, about.st_ino
