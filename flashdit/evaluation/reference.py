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
from flashdit.evaluation.images.sources import ReferenceSource, Source, check_image_size, open_reference
from flashdit.evaluation.stored import REFERENCE_SCHEMA, open_npz
from flashdit.shared.files import file_sha256, write_atomically
from flashdit.shared.seeds import generator_for

REFERENCE_MARK = "fingerprint.npy"
"""Name of an array that every file of make-reference holds."""
COLOURS_SEEN = 16  # images of a set that are asked whether they are grey


class Reference:
    """A reference: checked when it is made, read once, when its statistics are first asked for.

    An npz with `mu` and `sigma` gives its stored moments, over as many images as its author took, and its
    images `arr_0` serve for precision, recall and kernel distance alone; without moments everything comes
    from the images.

    Args:
        spec: A data set that brings one, the path of an npz, or a folder of images.
        extractor: Whose features are compared.
        background: What transparent pixels of a folder's images show.
        image_size: Side that a folder's images are cropped to, and that others must have, in pixels; None
            takes images as they are.

    Raises:
        ValueError: If there is nothing there, or its statistics are another extractor's.
    """

    def __init__(
        self, spec: str, extractor: Extractor, background: str = "white", image_size: int | None = None
    ):
        self.spec, self.extractor = spec, extractor
        self.stored: dict[str, torch.Tensor] = {}
        self.about: dict[str, Any] = {}
        self.companions = companions_of(spec)
        self.source: ReferenceSource | None
        self._kept: dict[tuple[str, frozenset[str]], ImageStatistics] = {}
        path = Path(spec)
        if self.companions.reference is None and path.is_file():
            self.stored, self.about, self.source = open_npz(path, extractor)
            check_image_size(self.image_size, image_size, spec)
        else:
            self.source = open_reference(spec, background, image_size)

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
    def sha256(self) -> str:
        """The hash of the file, or of what the images are known by."""
        return file_sha256(Path(self.spec)) if self.source is None else self.source.sha256

    @cached_property
    def colours(self) -> str | None:
        """Whether its images are `grey` or `colour`, None where it has none."""
        return None if self.source is None else first_colours(self.source)

    def recipe(self) -> dict[str, Any]:
        """Returns what a report says of it."""
        recipe = {"name": self.spec, "num_images": self.count, "sha256": self.sha256}
        cropped_to = getattr(self.source, "cropped_to", None)
        return recipe if cropped_to is None else {**recipe, "cropped_to": cropped_to}

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
    """Writes mu, sigma, mu_s and sigma_s (float64) of all images, and up to num_images of them with labels.

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
        if extractor.built_as is not None:
            name, weights = extractor.built_as
            arrays |= {"extractor_spec": name, "extractor_weights": weights or ""}
        for key in ("mu", "sigma", "mu_s", "sigma_s"):
            value = getattr(statistics, key)
            if value is not None:
                arrays[key] = value.cpu().numpy()
        ids = chosen_ids(source.count, num_images, seed)
        arrays |= classes_of(source, ids)
        write_atomically(path, lambda temporary: _write(temporary, arrays, source, ids, batch_size))


def classes_of(source: Source, ids: Tensor) -> dict[str, np.ndarray]:
    """Returns the labels of some images and what they are called, as far as a source knows."""
    if source.labels is None:
        return {}
    labels, names = source.labels[ids].numpy(), getattr(source, "class_names", None)
    if not names or not set(labels.tolist()) <= names.keys():
        return {"arr_1": labels}
    numbers = sorted(names)
    return {"arr_1": np.searchsorted(numbers, labels), "class_names": np.array([names[n] for n in numbers])}


def _write(path: Path, arrays: dict[str, Any], source: Source, ids: Tensor, batch_size: int) -> None:
    """Writes the npz, its images streamed."""
    with path.open("wb") as file:
        np.savez(file, **arrays)
    about = {"descr": "|u1", "fortran_order": False, "shape": (len(ids), *source.image_size, 3)}
    with zipfile.ZipFile(path, "a") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, about)  # pyright: ignore[reportArgumentType]
        for images in source.batches(batch_size, ids):
            member.write(rearrange(images, "b c h w -> b h w c").contiguous().numpy().tobytes())
