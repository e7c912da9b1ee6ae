"""What is kept of an image set once its features are extracted: moments, and rows where needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashdit.evaluation.features.cache import FeatureCache
from flashdit.evaluation.features.extractor import FORWARD_ROWS, Extractor
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.images.sources import GeneratedSource, Source
from flashdit.sampling.generator import watching
from flashdit.shared.moments import Moments
from flashdit.shared.process import full_float32
from flashdit.shared.progress import move_to, progress_bar

Part = dict[str, Tensor]  # fields of ImageStatistics; empty where the extractor has no such features

MOMENTS = {"moments": ("pool", "mu", "sigma"), "spatial": ("spatial", "mu_s", "sigma_s")}
ROWS = ("pool", "logits")


@dataclass(kw_only=True)
class ImageStatistics:
    """Features of a set of images, as far as they are known; None is what was not asked for or is not there.

    On several processes the main one has it all, the others only name and count.

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


class Share:
    """What one process extracts: moments and rows of its images.

    Args:
        parts: What to keep, of `moments`, `spatial`, `pool` and `logits`.
        device: Where sums live; rows are kept on the CPU.
    """

    def __init__(self, parts: Collection[str], device: str):
        self.parts, self.device = parts, device
        self.moments: dict[str, Moments] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, features: dict[str, Tensor | None]) -> None:
        """Adds the features of some images."""
        for part in self.parts:
            values = features.get(MOMENTS[part][0] if part in MOMENTS else part)
            if values is None:
                continue
            if part in MOMENTS:
                self.moments.setdefault(part, Moments(values.shape[1], self.device)).add(values)
            else:
                self.rows.setdefault(part, []).append(values.cpu())

    def gathered(self, ranks: Ranks) -> dict[str, Part]:
        """Returns every part of all images on the main process, nothing on the others."""
        found: dict[str, Part] = {}
        for part in sorted(self.parts):
            found[part] = self._all_moments(part, ranks) if part in MOMENTS else self._all_rows(part, ranks)
        return found if ranks.is_main else {}

    def _all_moments(self, part: str, ranks: Ranks) -> Part:
        """Returns mean and covariance of the images of all processes."""
        moments = self.moments.get(part)
        for other in ranks.from_others(moments.to("cpu") if moments and not ranks.is_main else moments):
            if moments is not None and other is not None:
                moments.merge(other)
        _, mean, covariance = MOMENTS[part]
        if moments is None or not ranks.is_main:
            return {}
        return {mean: moments.mean.cpu(), covariance: moments.covariance.cpu()}  # where files and caches are

    def _all_rows(self, part: str, ranks: Ranks) -> Part:
        """Returns the rows of all processes in the order of the images."""
        mine = torch.cat(self.rows[part]) if part in self.rows else None
        shares = [mine, *ranks.from_others(mine)]
        if mine is None or not ranks.is_main:
            return {}
        total = sum(len(share) for share in shares if share is not None)
        rows = mine.new_empty(total, *mine.shape[1:])
        for rank, share in enumerate(shares):
            if share is not None:
                rows[rank :: ranks.world] = share
        return {part: rows}


def collect(
    source: Source,
    extractor: Extractor,
    parts: Collection[str],
    batch_size: int,
    device: str = "cpu",
    ranks: Ranks | None = None,
    cache: FeatureCache | None = None,
) -> ImageStatistics:
    """Returns the statistics of every image of a source, extracted under a progress bar or from the cache.

    Args:
        source: Where the images come from.
        extractor: On `device`, in eval mode.
        parts: What to keep, of `moments`, `spatial`, `pool` and `logits`.
        batch_size: Images read at a time; the result does not depend on it.
        device: Where features and sums are computed.
        ranks: Who shares the work; None is this process alone. The result does not depend on it.
        cache: Where features are kept; None keeps none.

    Raises:
        ValueError: If the source cannot be read to its end, or holds fewer than two images for its moments.
    """
    ranks = ranks or Ranks()
    with ranks.agree():
        if MOMENTS.keys() & set(parts) and source.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {source.count} in '{source.name}'")
        key = cache.key(source, extractor, device) if cache and ranks.is_main else ""
        kept = {part: cache.read(key, part) for part in parts} if cache and ranks.is_main else {}
    found = {part: tensors for part, tensors in kept.items() if tensors is not None}
    missing = ranks.broadcast(set(parts) - set(found))
    if missing:
        fresh = extract(source, extractor, missing, batch_size, device, ranks)
        found |= fresh
        if cache is not None:
            for part, tensors in fresh.items():
                cache.write(key, part, tensors)
    fields = {name: tensor for tensors in found.values() for name, tensor in tensors.items()}
    labels = source.labels if ranks.is_main else None
    return ImageStatistics(name=source.name, count=source.count, labels=labels, **fields)


def extract(
    source: Source, extractor: Extractor, parts: Collection[str], batch_size: int, device: str, ranks: Ranks
) -> dict[str, Part]:
    """Returns the parts of all images on the main process; arguments are as in `collect`."""
    share = Share(parts, device)
    with ranks.agree(), full_float32():
        ids = ranks.share(source.count)
        hidden = None if ranks.is_main else True
        bar = progress_bar(total=len(ids), desc=source.name, unit="image", disable=hidden)
        generator, done = source.generator if isinstance(source, GeneratedSource) else None, 0
        with bar, watching(generator, partial(move_to, bar)) if generator else nullcontext():
            for images in regrouped(source.batches(batch_size, ids), FORWARD_ROWS):
                share.add(forward_padded(extractor, images, device))
                done += len(images)
                move_to(bar, done)
    return share.gathered(ranks)


def forward_padded(extractor: Extractor, images: Tensor, device: str) -> dict[str, Tensor | None]:
    """Returns the features of up to FORWARD_ROWS images, computed beside black ones up to that number.

    A forward of another shape rounds otherwise, so one shape makes each image's features its own.
    """
    rows = len(images)
    filled = torch.cat([images, images.new_zeros(FORWARD_ROWS - rows, *images.shape[1:])])
    features = extractor(filled.to(device))
    return {kind: None if values is None else values[:rows] for kind, values in features.items()}


def regrouped(batches: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Yields the same images in groups of `rows`, the last one maybe shorter."""
    pending: list[Tensor] = []
    for batch in batches:
        pending.append(batch)
        if sum(map(len, pending)) < rows:
            continue
        *full, rest = torch.cat(pending).split(rows)
        pending = [rest]
        if len(rest) == rows:
            full, pending = [*full, rest], []
        yield from full
    if pending:
        yield torch.cat(pending)
