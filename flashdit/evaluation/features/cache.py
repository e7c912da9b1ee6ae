"""Features kept between evaluations, filed by what they are of and not by a name."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdit.evaluation.features.extractor import FORWARD_ROWS, Extractor
from flashdit.evaluation.images.sources import Source
from flashdit.shared.files import file_sha256, write_atomically
from flashdit.shared.weights import tensors_crc32

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
KEY = re.compile("[0-9a-f]{64}")
CHECKSUM = "crc32"
"""Key of a file's metadata: of its tensors."""
CACHE_VARIABLE, SIZE_VARIABLE = "FLASHDIT_CACHE", "FLASHDIT_CACHE_GB"
DEFAULT_GB = 5.0
"""What the cache may hold, in 10^9 bytes: an evaluation of 50,000 images under Inception takes about 0.7."""


def default_folder() -> Path:
    """Returns $FLASHDIT_CACHE, or else ~/.cache/flashdit/features."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "flashdit" / "features"


def cache_limit() -> float:
    """Returns how many bytes the cache may hold: $FLASHDIT_CACHE_GB times 10^9, or the default.

    Raises:
        ValueError: If the variable is no number, or negative.
    """
    given = os.environ.get(SIZE_VARIABLE, "")
    try:
        limit = float(given) if given else DEFAULT_GB
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(f"{SIZE_VARIABLE} must be a number of gigabytes, 0 or more, got '{given}'")
    return limit * 1e9


def _is_ours(path: Path) -> bool:
    """Returns whether a file has a name that the cache gives: KE/KEY/PART.safetensors."""
    key = path.parent.name
    return KEY.fullmatch(key) is not None and path.parent.parent.name == key[:2]


class FeatureCache:
    """One safetensors file per part of the statistics of one content under one extractor.

    The name of the file is the hash of everything its content depends on, so that a stale one is never found.
    Once the files are larger than `cache_limit` together, those that were used longest ago are removed.

    Args:
        folder: Where files lie; None means `default_folder`.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = default_folder() if folder is None else folder
        self.limit = cache_limit()

    def key(self, source: Source, extractor: Extractor, device: str) -> str:
        """Returns the name of what is kept of a source."""
        code = inspect.getsourcefile(type(extractor))
        about = {
            "format": CACHE_FORMAT,
            "extractor": extractor.fingerprint,
            "code": file_sha256(Path(code)) if code else None,
            "torch": torch.__version__,
            "device": torch.device(device).type,
            "rows": FORWARD_ROWS,
            "source": source.identity(),
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()

    def read(self, key: str, part: str) -> dict[str, Tensor] | None:
        """Returns the tensors of a part, or None where there are none; an unreadable file is none."""
        path = self._path(key, part)
        try:
            if not path.is_file():
                return None
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get(CHECKSUM) != tensors_crc32(tensors):
                    raise ValueError("its checksum is not the one that it was written with")
            with suppress(OSError):
                os.utime(path)  # when it was last used
            return tensors
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning("features in %s cannot be read and are made again: %s", path, error)
            return None

    def write(self, key: str, part: str, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors of a part, whole or not at all; a full or read-only disk costs only a warning."""
        path = self._path(key, part)
        whole = {name: value.contiguous() for name, value in tensors.items()}
        about = {CHECKSUM: tensors_crc32(whole)}
        try:
            write_atomically(path, lambda temporary: save_file(whole, temporary, about))
        except (OSError, SafetensorError) as error:
            logger.warning("features cannot be kept in %s: %s", path, error)

        self._shrink()

    def _shrink(self) -> None:
        """Removes the files that were used longest ago until the rest is within the limit."""
        found = []
        for path in self.folder.glob("*/*/*.safetensors"):
            if not _is_ours(path):
                continue
            with suppress(FileNotFoundError):  # another process shrinks the cache too
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                path.parent.rmdir()  # stays while it holds other parts
            total -= size

    def _path(self, key: str, part: str) -> Path:
        """Returns the file of a part."""
        return self.folder / key[:2] / key / f"{part}.safetensors"
