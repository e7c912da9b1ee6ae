"""Writes a reference: statistics of a whole image set and some of its images, under ADM's keys."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flashdit.evaluation.cache import FeatureCache
from flashdit.evaluation.features import Extractor
from flashdit.evaluation.ranks import Ranks
from flashdit.evaluation.reference import SCHEMA
from flashdit.evaluation.sources import Source
from flashdit.evaluation.statistics import collect
from flashdit.files import write_atomically
from flashdit.seeds import generator_for

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
            "schema": SCHEMA,
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
