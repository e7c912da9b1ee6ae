"""A folder of images → VAE → latent shards and their manifest: many processes, resumable by the shard."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashdit.data.autoencoders import lasting_name, load_vae
from flashdit.data.encode import STORED_DTYPES, MirrorEncoder
from flashdit.data.encode_plan import (
    PLAN,
    assign,
    check_plan,
    describe_update,
    known_classes,
    listing_sha256,
    lost_records,
    read_plan,
    read_records,
    record_file,
    records_of,
    tidy_records,
)
from flashdit.data.images import enlarged_images, report_images
from flashdit.data.inspection import ReadableImages, ReadBatch
from flashdit.data.manifest import MANIFEST, MANIFEST_FORMAT, RECORDS
from flashdit.data.shards import CLASS_NAMES_FILE, shard_name, write_shard, write_statistics
from flashdit.data.sources import MOST_PIXELS, ImageFolder, ImagesOptions
from flashdit.shared.files import file_sha256, write_atomically, write_checked_json
from flashdit.shared.moments import ChannelMoments
from flashdit.shared.paths import check_outside, printable, resolved
from flashdit.shared.process import AUTO, AUTOCAST, decided
from flashdit.shared.progress import progress_bar
from flashdit.shared.readers import check_workers, read_batches
from flashdit.shared.registry import unknown
from flashdit.shared.seeds import check_seed

logger = logging.getLogger(__name__)
ENLARGED_MUCH = 4  # times; said at once, not only at the end


@dataclass(kw_only=True)
class EncodingOptions:
    """Options of encoding a folder of images, checked when made."""

    images: str
    """Folder whose sub-folders are the classes."""
    vae: str
    """As `latents.vae`."""
    out: str
    """Folder of the shards; the same folder resumes."""
    image_size: int = 256
    """Side of ADM's centre crop, in pixels."""
    background: str = "white"
    """What transparent pixels show: a colour's name or `#rrggbb`."""
    batch_size: int = 64
    workers: int = 4
    """Processes that read images, for each encoding process."""
    shard_rows: int = 10_000
    """Images of a shard; each has two latents."""
    dtype: str = "float32"
    """What is stored: `float32`, `float16` or `bfloat16`."""
    sample: bool = False
    """Whether to store a sample of the posterior, as LightningDiT does, instead of its mean."""
    seed: int = 0
    """Of the samples: image i has the same one whatever the batch or process count."""
    precision: str = "tf32"
    """What the VAE computes in: `fp32`, `tf32` (fp32 on a CPU), `bf16`, `fp16` or `auto`."""

    def __post_init__(self):
        for name in ("image_size", "batch_size", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size > MOST_PIXELS:
            raise ValueError(f"image_size must be at most {MOST_PIXELS}, got {self.image_size}")
        check_seed(self.seed, "seed")
        check_workers(self.workers, "workers")
        for name, known in (("dtype", STORED_DTYPES), ("precision", (*AUTOCAST, AUTO))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)


class FolderEncoding:
    """The encoding of one folder into one folder; what it will be is fixed before the first image.

    Shard n of a new encoding holds images n·R to (n+1)·R − 1 of the listing, whoever encodes it, so that a
    resume may run on another number of processes. A shard counts as done once its record lies beside it.
    Where the folder lost or gained images since, `assign` says which shards are written again.

    Args:
        options: How to encode what.
        device: Where the VAE runs.

    Raises:
        ValueError: If the images or the VAE cannot be read, or `out` holds something else.
    """

    def __init__(self, options: EncodingOptions, device: torch.device | str = "cpu"):
        options = replace(options, precision=decided(options.precision, device))
        self.options, self.out = options, Path(options.out)
        check_outside(self.out, options.images, "--out", "--images")
        self.before = read_plan(self.out)
        self.source = _open_folder(options, self.out, self.before)
        self.listing = dict(zip(self.source.names, self.source.num_bytes, strict=True))
        self.vae = load_vae(options.vae)
        seed = options.seed if options.sample else None
        self.encode = MirrorEncoder(self.vae, torch.device(device), options.precision, options.dtype, seed)
        self.shape = self.encode.shape(options.image_size)
        self.fixed = {
            "format": MANIFEST_FORMAT,
            "vae_identity": self.vae.identity,
            "image_size": options.image_size,
            "background": options.background,
            "posterior": "sample" if options.sample else "mean",
            "seed": seed,
            "dtype": options.dtype,
            "precision": options.precision,
            "shard_rows": options.shard_rows,
        }
        check_plan(self.out, self.before, self.fixed)
        self.plan = self.fixed | {
            "listing_sha256": listing_sha256(self.listing),
            "class_names": self.source.class_names,
        }
        self.records = records_of(self.out, self.before, self.listing, options.images)
        self.row_of = {name: row for row, name in enumerate(self.source.names)}
        self.said_enlarged = False
        self.shards, self.kept = assign(self.listing, self.records, options.shard_rows)

    def begin(self) -> None:
        """Writes what the encoding will be, and says so; one process calls it before any writes."""
        report_images(self.source.found.describe(), self.source.found.unreadable)
        if lost := lost_records(self.out, self.records):
            logger.warning("%s has no record of %s: encoded again", self.out / RECORDS, ", ".join(lost))
        elif update := describe_update(self.listing, self.records, self.kept) if self.records else "":
            logger.info("%s", update)
        if self.before != self.plan:
            (self.out / MANIFEST).unlink(missing_ok=True)  # an encoding that is cut off is not complete
            write_checked_json(self.out / PLAN, self.plan)
        tidy_records(self.out, self.records, self.listing, self.shards, self.kept)

    def write(self, rank: int = 0, ranks: int = 1, progress: bool = True) -> None:
        """Writes those missing shards that fall to this process.

        Args:
            rank: This process.
            ranks: How many processes there are.
            progress: Whether to show a bar.
        """
        count = len(self.shards)
        if ranks > count and rank == 0:
            logger.info("%d shards keep %d of %d processes idle", count, ranks - count, ranks)
        mine = progress_bar([*self.shards][rank::ranks], desc="check", leave=False, disable=not progress)
        missing = [shard for shard in mine if not self._is_done(shard)]
        batches = [batch for shard in missing for batch in self._batches(shard)]
        workers = min(self.options.workers, len(batches))
        read = read_batches(ReadableImages(self.source), workers, batch_size=None, sampler=batches)
        total = sum(map(len, batches))
        hidden = not (progress and total)
        with progress_bar(total=total, desc="encode", unit="image", disable=hidden) as bar:
            for shard in missing:
                self._write_shard(shard, read, bar)

    def _batches(self, shard: int) -> list[list[int]]:
        """Returns the rows of a shard in batches."""
        rows, size = [self.row_of[name] for name in self.shards[shard]], self.options.batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _is_done(self, shard: int) -> bool:
        """Returns whether a shard lies there as its record says; one that differs is named."""
        if shard not in self.kept:
            return False
        record = self.records[shard]
        path = self.out / record["file"]
        if path.is_file() and file_sha256(path) == record["sha256"]:
            return True
        logger.warning("%s is missing or corrupt and is written again", path)
        return False

    def _write_shard(self, shard: int, read: Iterator[ReadBatch], bar: tqdm) -> None:
        """Encodes one shard from the batches that come next, and writes it with its record."""
        parts = [torch.empty(2, 0, *self.shape, dtype=STORED_DTYPES[self.options.dtype])]
        rows: list[int] = []
        small: dict[str, int] = {}
        unreadable: dict[str, str] = {}
        transparent = animated = 0
        first = shard * self.options.shard_rows  # numbers of posterior noise: each image has its own
        for batch in self._batches(shard):
            found = next(read)
            numbers = {row: first + place for place, row in enumerate(batch)}
            if found.images is not None:
                parts.append(self._encode(found.images, found.rows, [numbers[row] for row in found.rows]))
            rows += found.rows
            names = (self.source.names[row] for row in found.rows)
            small |= self._small(dict(zip(names, found.short_sides, strict=True)))
            unreadable |= {self.source.names[row]: why for row, why in found.unreadable.items()}
            transparent += found.transparent
            animated += found.animated
            first += len(batch)
            bar.update(len(batch))
        latents, mirrored = torch.cat(parts, 1)
        path = write_shard(self.out, 0, shard, latents, mirrored, self.source.labels[rows])
        for name, why in unreadable.items():
            logger.warning("skipped %s, which cannot be read: %s", printable(name), why)
        record = {
            "file": path.name,
            "rows": len(rows),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "images": {name: self.listing[name] for name in self.shards[shard]},
            "small": small,
            "transparent": transparent,
            "animated": animated,
            "unreadable": unreadable,
            "moments": asdict(ChannelMoments.of(latents)),
        }
        write_checked_json(record_file(self.out, shard), record)

    def _small(self, short_sides: dict[str, int]) -> dict[str, int]:
        """Returns the short sides of the images that are enlarged; the first much enlarged one is named."""
        size = self.options.image_size
        much = [name for name, side in short_sides.items() if side * ENLARGED_MUCH <= size]
        if much and not self.said_enlarged:
            self.said_enlarged = True
            logger.warning(
                "%s is enlarged %.1f times, perhaps others too: see --image-size",
                printable(much[0]),
                size / short_sides[much[0]],
            )
        return {name: side for name, side in short_sides.items() if side < size}

    def _encode(self, images: Tensor, rows: list[int], numbers: list[int]) -> Tensor:
        """Returns latents of images and mirrors (2, B, C, H, W), all finite."""
        latents = self.encode(images, numbers)
        finite = latents.isfinite().all(0).flatten(1).all(1)
        if not finite.all():
            name = printable(self.source.names[rows[int(finite.int().argmin())]])
            kinds = f"precision={self.options.precision} and dtype={self.options.dtype}"
            raise ValueError(f"latents must be finite, those of {name} are not with {kinds}")
        return latents

    def finish(self) -> dict[str, Any]:
        """Writes class names, statistics and manifest once all shards are done, and returns the manifest.

        Raises:
            ValueError: If no image could be read, or a latent channel is constant.
        """
        written = read_records(self.out)
        lost = [shard_name(0, shard) for shard in self.shards if shard not in written]
        if lost:
            raise ValueError(f"every shard must have its record, {', '.join(lost)} have not: encode again")
        records = [*written.values()]
        count = sum(record["rows"] for record in records)
        if not count:
            raise ValueError(f"at least one image must be readable, none of {len(self.listing)} is")
        moments = ChannelMoments.joined(ChannelMoments(**record["moments"]) for record in records)
        std = moments.std()
        unreadable = dict(self.source.found.unreadable)
        for record in records:
            unreadable |= {name: why for name, why in record["unreadable"].items() if name in self.listing}
        manifest = self.plan | {
            "vae": lasting_name(self.options.vae),
            "vae_config": self.vae.config,
            "images": str(resolved(self.options.images)),
            "listed": len(self.listing) + len(self.source.found.unreadable),
            "encoded": count,
            "unreadable": unreadable,
            "enlarged": enlarged_images(
                {name: side for record in records for name, side in record.get("small", {}).items()},
                self.options.image_size,
            ),
            "transparent": _sum_of(records, "transparent"),
            "animated": _sum_of(records, "animated"),
            "shape": self.shape,
            "mean": moments.mean,
            "std": std,
            "shards": [
                {name: record[name] for name in ("file", "rows", "bytes", "sha256")} for record in records
            ],
        }
        write_atomically(
            self.out / CLASS_NAMES_FILE, lambda path: path.write_text(json.dumps(self.source.class_names))
        )
        channels = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (moments.mean, std))
        write_statistics(self.out, *channels)
        write_checked_json(self.out / MANIFEST, manifest)
        return manifest


def _sum_of(records: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """Returns the sum of a count over shards; None where one of them, of an earlier version, has none."""
    return sum(record[name] for record in records) if all(name in record for record in records) else None


def _open_folder(options: EncodingOptions, out: Path, before: dict[str, Any]) -> ImageFolder:
    """Returns the folder of images, its classes in the order of an earlier encoding."""
    images = ImagesOptions(path=options.images, image_size=options.image_size, background=options.background)
    names = known_classes(out, before)
    source = ImageFolder(images, names, called="--images")
    if before and not names:  # cut off, by a version that ordered classes by their plain text
        return ImageFolder(images, sorted(source.class_names), called="--images")
    return source
