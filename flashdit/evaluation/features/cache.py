"""Features kept between evaluations, filed by what they are of and not by a name."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdit.evaluation.features.extractor import FORWARD_ROWS, Extractor
from flashdit.evaluation.images.sources import Source
from flashdit.shared.files import file_sha256, write_atomically

logger = logging.getLogger(__name__)

CACHE_FORMAT = 1
CACHE_VARIABLE = "FLASHDIT_CACHE"


def default_folder() -> Path:
    """Returns $FLASHDIT_CACHE, or else ~/.cache/flashdit/features."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "flashdit" / "features"


class FeatureCache:
    """One safetensors file per part of the statistics of one content under one extractor.

    The name of the file is the hash of everything its content depends on, so that a stale one is never found.

    Args:
        folder: Where files lie; None means `default_folder`.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = default_folder() if folder is None else folder

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
            return load_file(path) if path.is_file() else None
        except (OSError, SafetensorError) as error:
            logger.warning("features in %s cannot be read and are made again: %s", path, error)
            return None

    def write(self, key: str, part: str, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors of a part, whole or not at all; a full or read-only disk costs only a warning."""
        path = self._path(key, part)
        whole = {name: value.contiguous() for name, value in tensors.items()}
        try:
            write_atomically(path, lambda temporary: save_file(whole, temporary))
        except (OSError, SafetensorError) as error:
            logger.warning("features cannot be kept in %s: %s", path, error)

    def _path(self, key: str, part: str) -> Path:
        """Returns the file of a part."""
        return self.folder / key[:2] / key / f"{part}.safetensors"
