"""What is kept of an image set once its features are extracted: moments, and rows where needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flashdit.evaluation.features import Extractor
from flashdit.evaluation.moments import Moments
from flashdit.evaluation.sources import Source


@dataclass(kw_only=True)
class ImageStatistics:
    """Features of a set of images, as far as they are known; None is what was not asked for or is not there.

    Attributes:
        name: What the set is called in messages and reports.
        count: Number of images behind the moments; None means unknown (ADM's references do not store it).
        mu: (d,) float64 mean of the pool features.
        sigma: (d, d) float64 covariance.
        mu_s: (s,) float64 mean of the spatial features.
        sigma_s: (s, s) float64 covariance.
        pool: (n, d) float32 pool features, in order; n may be less than count.
        logits: (n, classes) float32.
        labels: (n,) int64.
    """

    name: str
    count: int | None
    mu: Tensor | None = None
    sigma: Tensor | None = None
    mu_s: Tensor | None = None
    sigma_s: Tensor | None = None
    pool: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None


def collect(
    source: Source, extractor: Extractor, parts: Collection[str], batch_size: int, device: str = "cpu"
) -> ImageStatistics:
    """Extracts the features of every image of a source, under a progress bar.

    Args:
        source: Where the images come from.
        extractor: On `device`, in eval mode.
        parts: What to keep, of `moments`, `spatial`, `pool` and `logits`.
        batch_size: Images per forward; the result does not depend on it.
        device: Where features and sums are computed; rows are kept on the CPU.

    Raises:
        ValueError: If the source cannot be read to its end, or holds fewer than two images for its moments.
    """
    moments: dict[str, Moments] = {}
    rows: dict[str, list[Tensor]] = {"pool": [], "logits": [], "labels": []}
    with tqdm(total=source.count, desc=source.name, unit="image", disable=None) as progress:
        for images, labels in source.batches(batch_size):
            features = extractor(images.to(device))
            for kind, part in (("pool", "moments"), ("spatial", "spatial")):
                values = features[kind]
                if part in parts and values is not None:
                    moments.setdefault(kind, Moments(values.shape[1], device)).add(values)
            for kind in ("pool", "logits"):
                values = features[kind]
                if kind in parts and values is not None:
                    rows[kind].append(values.cpu())
            if labels is not None:
                rows["labels"].append(labels)
            progress.update(len(images))
    pool, spatial = moments.get("pool"), moments.get("spatial")
    return ImageStatistics(
        name=source.name,
        count=source.count,
        mu=pool.mean if pool else None,
        sigma=pool.covariance if pool else None,
        mu_s=spatial.mean if spatial else None,
        sigma_s=spatial.covariance if spatial else None,
        **{kind: torch.cat(values) if values else None for kind, values in rows.items()},
    )
