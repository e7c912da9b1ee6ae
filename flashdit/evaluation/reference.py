"""What samples are compared with: an npz of ADM's or of make-reference, a folder, or a data set's own."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashdit.data.sources import companions_of
from flashdit.evaluation.features.cache import FeatureCache
from flashdit.evaluation.features.extractor import Extractor, colours_of
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.features.statistics import ImageStatistics, collect
from flashdit.evaluation.images.npz import NpzSource, check_headers
from flashdit.evaluation.images.sources import ReferenceSource, Source, open_reference
from flashdit.shared.files import file_sha256, write_atomically
from flashdit.shared.seeds import generator_for

STORED = ("mu", "sigma", "mu_s", "sigma_s")
REFERENCE_KEYS = (
    "schema",
    "n",
    "extractor",
    "fingerprint",
    "image_size",
)  # what make-reference adds to ADM's keys
REFERENCE_SCHEMA = 1
COLOURS_SEEN = 16  # images of a set that are asked whether they are grey
COVARIANCE_TOLERANCE = 1e-5  # of its largest entry, above what float32 features round to


class Reference:
    """A reference: checked when it is made, read once, when its statistics are first asked for.

    An npz with `mu` and `sigma` gives its stored moments, over as many images as its author took, and its
    images `arr_0` serve for precision, recall and kernel distance alone; without moments everything comes
    from the images.

    Args:
        spec: A data set that brings one, the path of an npz, or a folder of images.
        extractor: Whose features are compared.
        background: What transparent pixels of a folder's images show.

    Raises:
        ValueError: If there is nothing there, or its statistics are another extractor's.
    """

    def __init__(self, spec: str, extractor: Extractor, background: str = "white"):
        self.spec, self.extractor = spec, extractor
        self.stored: dict[str, torch.Tensor] = {}
        self.about: dict[str, Any] = {}
        self.companions = companions_of(spec)
        self.source: ReferenceSource | None
        self._kept: dict[tuple[str, frozenset[str]], ImageStatistics] = {}
        path = Path(spec)
        if self.companions.reference is None and path.is_file():
            self.stored, self.about, self.source = open_npz(path, extractor)
        else:
            self.source = open_reference(spec, background)

    @property
    def count(self) -> int | None:
        """Images behind its moments; None where its author did not say."""
        if self.stored:
            return self.about.get("n")
        return self.source.count if self.source else None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(h, w) of its images, None where it neither says nor has any."""
        return self.about.get("image_size") or (self.source.image_size if self.source else None)

    @property
    def warnings(self) -> list[str]:
        """What makes it doubtful."""
        if self.stored and not self.about and not self.extractor.is_inception:
            name = Path(self.spec).name
            return [f"'{name}' does not say whose features it has: '{self.extractor.name}' is assumed"]
        return []

    @cached_property
    def colours(self) -> str | None:
        """Whether its images are `grey` or `colour`; None where it has none."""
        return None if self.source is None else first_colours(self.source)

    @cached_property
    def sha256(self) -> str:
        """The hash of the file, or of what the images are known by."""
        return file_sha256(Path(self.spec)) if self.source is None else self.source.sha256

    def recipe(self) -> dict[str, Any]:
        """Returns what a report says of it."""
        return {"name": self.spec, "num_images": self.count, "sha256": self.sha256}

    def statistics(
        self,
        parts: Collection[str],
        batch_size: int,
        device: str,
        ranks: Ranks | None = None,
        cache: FeatureCache | None = None,
    ) -> ImageStatistics:
        """Returns its statistics; stored moments are taken as they are. Arguments are as in `collect`."""
        key = "reference", frozenset(parts)
        if key not in self._kept:
            self._kept[key] = self._read(parts, batch_size, device, ranks, cache)
        return self._kept[key]

    def floor(self, parts: Collection[str], *reading: Any) -> ImageStatistics | None:
        """Returns the statistics of training images, where its data set brings some."""
        key = "floor", frozenset(parts)
        if key not in self._kept and self.companions.floor is not None:
            self._kept[key] = collect(self.companions.floor(), self.extractor, parts, *reading)
        return self._kept.get(key)

    def _read(self, parts: Collection[str], *reading: Any) -> ImageStatistics:
        """Returns its statistics, extracted as far as they are not stored."""
        if not self.stored:
            assert self.source is not None
            return collect(self.source, self.extractor, parts, *reading)
        statistics = ImageStatistics(name=Path(self.spec).name, count=self.count, **self.stored)
        of_images = set(parts) & {"pool", "logits"}
        if self.source is not None and of_images:
            found = collect(self.source, self.extractor, of_images, *reading)
            statistics.pool, statistics.logits, statistics.labels = found.pool, found.logits, found.labels
        return statistics


def first_colours(source: Source) -> str:
    """Returns whether the first images of a source are `grey` or `colour`."""
    return colours_of(next(iter(source.batches(COLOURS_SEEN, torch.arange(min(COLOURS_SEEN, source.count))))))


def open_npz(
    path: Path, extractor: Extractor
) -> tuple[dict[str, torch.Tensor], dict[str, Any], ReferenceSource | None]:
    """Returns the stored moments of an npz, what it says of them and its images, as far as it has them."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"a reference must be a data set that brings one, an npz or a folder, got {path}")
    try:
        check_headers(path)
        with np.load(path, allow_pickle=False) as arrays:
            keys = set(arrays.files)
            stored = {
                key: torch.from_numpy(np.array(arrays[key], np.float64)) for key in STORED if key in keys
            }
            about = {key: arrays[key].tolist() for key in REFERENCE_KEYS if key in keys}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"a reference must be an npz of arrays, got {path}: {error}") from error
    check_about(about, path, extractor)
    check_stored(stored, path, extractor)
    if not stored and "arr_0" not in keys:
        raise ValueError(
            f"a reference npz must hold mu and sigma, or images in arr_0, got {sorted(keys)} in {path}"
        )
    if "image_size" in about:
        height, width = about["image_size"]
        about["image_size"] = (height, width)
    return stored, about, NpzSource(path) if "arr_0" in keys else None


def check_about(about: dict[str, Any], path: Path, extractor: Extractor) -> None:
    """Raises ValueError for a file of make-reference of another schema or of other features."""
    if not about:
        return
    missing = sorted(set(REFERENCE_KEYS) - set(about))
    if missing or about["schema"] != REFERENCE_SCHEMA:
        got = f"no {missing}" if missing else f"schema {about['schema']}"
        raise ValueError(
            f"a file of make-reference must have all of {list(REFERENCE_KEYS)} in schema {REFERENCE_SCHEMA}, "
            f"got {got} in {path}"
        )
    if about["fingerprint"] != extractor.fingerprint:
        raise ValueError(
            f"a reference must be of the same extractor and weights, got '{about['extractor']}' "
            f"({about['fingerprint'][-12:]}) in {path} for '{extractor.name}' ({extractor.fingerprint[-12:]})"
        )


def check_stored(stored: dict[str, torch.Tensor], path: Path, extractor: Extractor) -> None:
    """Raises ValueError for moments without their partner or of another extractor's dimensions."""
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
        if value.ndim == 2:
            check_covariance(value, key, path)
    if stored and "mu" not in stored:
        raise ValueError(f"a reference with mu_s must hold mu and sigma too, got {sorted(stored)} in {path}")
    expected = {"mu": extractor.pool_dimensions, "mu_s": extractor.spatial_dimensions}
    for mean in expected.keys() & stored.keys():
        if stored[mean].numel() != expected[mean]:
            raise ValueError(
                f"{mean} must have the {expected[mean]} dimensions of extractor '{extractor.name}', "
                f"got {stored[mean].numel()} in {path}"
            )


def check_covariance(sigma: torch.Tensor, key: str, path: Path) -> None:
    """Raises ValueError unless a matrix is symmetric and has no negative variance, but for rounding."""
    allowed = COVARIANCE_TOLERANCE * sigma.abs().max().item()
    asymmetry = (sigma - sigma.T).abs().max().item()
    if asymmetry > allowed:
        raise ValueError(
            f"{key} must be a covariance, which is symmetric, got entries {asymmetry:.2g} from their mirrors "
            f"in {path}"
        )
    _, failed_at = torch.linalg.cholesky_ex(sigma + allowed * torch.eye(len(sigma), dtype=sigma.dtype))
    if failed_at and allowed:
        raise ValueError(f"{key} must be a covariance, which has no negative variance, got one in {path}")


NUM_IMAGES = 10_000  # as many as ADM's files hold


def chosen_ids(count: int, num_images: int, seed: int) -> Tensor:
    """Returns the ascending ids of the images that a reference keeps: all, or a seeded choice of so many."""
    order = torch.randperm(count, generator=generator_for(seed, "reference", 0))
    return order[:num_images].sort().values


def write_reference(
    source: Source,
    extractor: Extractor,
    path: Path,
    *,
    num_images: int = NUM_IMAGES,
    seed: int = 0,
    batch_size: int = 100,
    device: str = "cpu",
    ranks: Ranks | None = None,
    cache: FeatureCache | None = None,
) -> None:
    """Writes mu, sigma, mu_s and sigma_s (float64) of all images, and up to num_images of them.

    Args:
        source: The images.
        extractor: On `device`, in eval mode.
        path: The npz to write; ADM's evaluator reads it where the extractor is Inception.
        num_images: How many images to keep in `arr_0`, which precision and recall are computed on.
        seed: Of the choice of images.
        batch_size: Images read at a time.
        device: Where features are computed.
        ranks: Who shares the work; the main process writes.
        cache: Where features are kept; None keeps none.

    Raises:
        ValueError: If num_images is not positive or an image cannot be read.
    """
    if num_images < 1:
        raise ValueError(f"a reference must keep at least 1 image, got {num_images}")
    ranks = ranks or Ranks()
    statistics = collect(source, extractor, {"moments", "spatial"}, batch_size, device, ranks, cache)
    with ranks.agree():
        if not ranks.is_main:
            return
        arrays: dict[str, Any] = {
            "schema": REFERENCE_SCHEMA,
            "n": source.count,
            "extractor": extractor.name,
            "fingerprint": extractor.fingerprint,
            "image_size": source.image_size,
        }
        for key in ("mu", "sigma", "mu_s", "sigma_s"):
            value = getattr(statistics, key)
            if value is not None:
                arrays[key] = value.cpu().numpy()
        ids = chosen_ids(source.count, num_images, seed)
        write_atomically(path, lambda temporary: _write(temporary, arrays, source, ids, batch_size))


def _write(path: Path, arrays: dict[str, Any], source: Source, ids: Tensor, batch_size: int) -> None:
    """Writes the npz, its images streamed."""
    with path.open("wb") as file:
        np.savez(file, **arrays)
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(ids), *source.image_size, 3)}
    with zipfile.ZipFile(path, "a") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, about)  # pyright: ignore[reportArgumentType]
        for images in source.batches(batch_size, ids):
            member.write(rearrange(images, "b c h w -> b h w c").contiguous().numpy().tobytes())
