"""What samples are held against: ADM's npz, a folder of images, or the held-out digits."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from flashdit.evaluation.features import Extractor
from flashdit.evaluation.sources import DigitsSource, NpzSource, Source, open_source
from flashdit.evaluation.statistics import ImageStatistics, collect

STORED = ("mu", "sigma", "mu_s", "sigma_s")


class Reference:
    """A reference: checked when it is made, read when its statistics are asked for.

    An npz with `mu` and `sigma` gives its stored moments, over as many images as its author took, and its
    images `arr_0` serve for precision and recall alone; without moments everything comes from the images.

    Args:
        spec: `digits` (the held-out split), the path of an npz, or a folder of images.
        extractor: Whose features are compared.

    Raises:
        ValueError: If there is nothing there, or its statistics are another extractor's.
    """

    def __init__(self, spec: str, extractor: Extractor):
        self.spec, self.extractor = spec, extractor
        self.stored: dict[str, torch.Tensor] = {}
        path = Path(spec)
        self.source: Source | None
        if spec == "digits":
            self.source = DigitsSource("held-out")
        elif path.is_dir():
            self.source = open_source(path)
        elif path.is_file():
            self.stored, self.source = open_npz(path, extractor)
        else:
            raise ValueError(f"a reference must be 'digits', an existing npz or a folder, got {spec}")

    def statistics(self, parts: Collection[str], batch_size: int, device: str) -> ImageStatistics:
        """Returns its statistics; stored moments are taken as they are.

        Args:
            parts: What `collect` should keep.
            batch_size: Images per forward.
            device: Where features are computed.
        """
        if not self.stored:
            assert self.source is not None
            return collect(self.source, self.extractor, parts, batch_size, device)
        name = Path(self.spec).name
        statistics = ImageStatistics(name=name, count=None, **self.stored)
        if self.source is not None and "pool" in parts:
            statistics.pool = collect(self.source, self.extractor, {"pool"}, batch_size, device).pool
        return statistics


def open_npz(path: Path, extractor: Extractor) -> tuple[dict[str, torch.Tensor], Source | None]:
    """Returns the stored moments of an npz, which may be none, and its images, which may be absent."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"a reference must be 'digits', an npz or a folder, got {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            keys = set(arrays.files)
            stored = {
                key: torch.from_numpy(np.array(arrays[key], np.float64)) for key in STORED if key in keys
            }
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"a reference must be an npz of arrays, got {path}: {error}") from error
    check_stored(stored, path, extractor)
    if not stored and "arr_0" not in keys:
        raise ValueError(
            f"a reference npz must hold mu and sigma, or images in arr_0, got {sorted(keys)} in {path}"
        )
    return stored, NpzSource(path) if "arr_0" in keys else None


def check_stored(stored: dict[str, torch.Tensor], path: Path, extractor: Extractor) -> None:
    """Refuses stored moments that come without their partner or have another extractor's dimensions."""
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if (mean in stored) != (covariance in stored):
            raise ValueError(
                f"{mean} and {covariance} of a reference must come together, got {sorted(stored)} in {path}"
            )
        if mean in stored and stored[covariance].shape != (stored[mean].numel(),) * 2:
            shapes = tuple(stored[mean].shape), tuple(stored[covariance].shape)
            raise ValueError(f"{mean} must be (d,) and {covariance} (d, d), got shapes {shapes} in {path}")
    for key, value in stored.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} of a reference must be finite, got NaN or infinity in {path}")
    if stored and "mu" not in stored:
        raise ValueError(f"a reference with mu_s must hold mu and sigma too, got {sorted(stored)} in {path}")
    expected = {"mu": extractor.pool_dimensions, "mu_s": extractor.spatial_dimensions}
    for mean in expected.keys() & stored.keys():
        if stored[mean].numel() != expected[mean]:
            raise ValueError(
                f"{mean} must have the {expected[mean]} dimensions of extractor '{extractor.name}', "
                f"got {stored[mean].numel()} in {path}"
            )
