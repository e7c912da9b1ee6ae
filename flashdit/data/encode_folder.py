"""A folder of images → VAE → latent shards and their manifest: many processes, resumable by the shard."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flashdit.data.autoencoders import load_vae
from flashdit.data.encode import STORED_DTYPES, MirrorEncoder
from flashdit.data.images import ReadableImages, ReadBatch
from flashdit.data.manifest import MANIFEST, MANIFEST_FORMAT, RECORDS
from flashdit.data.shards import CLASS_NAMES_FILE, write_shard, write_statistics
from flashdit.data.sources import ImageFolder, ImagesOptions
from flashdit.shared.files import file_sha256, write_atomically, write_json
from flashdit.shared.locks import LOCK
from flashdit.shared.moments import ChannelMoments
from flashdit.shared.process import AUTOCAST
from flashdit.shared.progress import progress_bar
from flashdit.shared.readers import read_batches
from flashdit.shared.registry import unknown

logger = logging.getLogger(__name__)
PLAN = f"{RECORDS}/plan.json"


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
    """What the VAE computes in: `fp32`, `tf32` (fp32 on a CPU), `bf16` or `fp16`."""

    def __post_init__(self):
        for name in ("image_size", "batch_size", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, known in (("dtype", STORED_DTYPES), ("precision", AUTOCAST)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)


class FolderEncoding:
    """The encoding of one folder into one folder; what it will be is fixed before the first image.

    Shard n holds images n·R to (n+1)·R − 1 of the sorted listing, whoever encodes it, so that a resume may
    run on another number of processes. A shard counts as done once its record lies beside it.

    Args:
        options: How to encode what.
        device: Where the VAE runs.

    Raises:
        ValueError: If the images or the VAE cannot be read, or `out` holds something else.
    """

    def __init__(self, options: EncodingOptions, device: torch.device | str = "cpu"):
        self.options, self.out = options, Path(options.out)
        self.source = _open_folder(options)
        self.num_images = len(self.source.paths)
        self.num_shards = math.ceil(self.num_images / options.shard_rows)
        self.vae = load_vae(options.vae)
        seed = options.seed if options.sample else None
        self.encode = MirrorEncoder(self.vae, torch.device(device), options.precision, options.dtype, seed)
        self.shape = self.encode.shape(options.image_size)
        self.fixed = {
            "format": MANIFEST_FORMAT,
            "vae_identity": self.vae.identity,
            "listing_sha256": self._listing(),
            "image_size": options.image_size,
            "posterior": "sample" if options.sample else "mean",
            "seed": seed,
            "dtype": options.dtype,
            "precision": options.precision,
            "shard_rows": options.shard_rows,
        }
        self._check_out()

    def _listing(self) -> str:
        """Returns the SHA-256 of the names and sizes of all images, in order."""
        digest = hashlib.sha256()
        for row, path in enumerate(self.source.paths):
            digest.update(f"{self._name(row)}\0{path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def _check_out(self) -> None:
        """Refuses a folder that holds anything but this encoding or a part of it."""
        plan = self.out / PLAN
        if not plan.exists():
            if self.out.exists() and (
                not self.out.is_dir() or any(path.name != LOCK for path in self.out.iterdir())
            ):
                raise ValueError(f"--out must be a new folder or one of an earlier encoding, got {self.out}")
            return
        before = json.loads(plan.read_text())
        for key, now in self.fixed.items():
            if before.get(key) != now:
                was, now = (str(value)[:12] for value in (before.get(key), now))
                raise ValueError(
                    f"{self.out} holds latents whose {key} is {was}, not {now}: give another --out"
                )

    def begin(self) -> None:
        """Writes what the encoding will be; one process calls it before any writes."""
        if not (self.out / PLAN).exists():
            write_json(self.out / PLAN, self.fixed)

    def write(self, rank: int = 0, ranks: int = 1, progress: bool = True) -> None:
        """Writes those missing shards that fall to this process.

        Args:
            rank: This process.
            ranks: How many processes there are.
            progress: Whether to show a bar.
        """
        if ranks > self.num_shards and rank == 0:
            logger.info(
                "%d shards keep %d of %d processes idle", self.num_shards, ranks - self.num_shards, ranks
            )
        mine = progress_bar(
            range(rank, self.num_shards, ranks), desc="check", leave=False, disable=not progress
        )
        missing = [shard for shard in mine if not self._is_done(shard)]
        batches = [batch for shard in missing for batch in self._batches(shard)]
        workers = min(self.options.workers, len(batches))
        read = read_batches(ReadableImages(self.source), workers, batch_size=None, sampler=batches)
        total = sum(map(len, batches))
        hidden = not (progress and total)
        with progress_bar(total=total, desc="encode", unit="image", disable=hidden) as bar:
            for shard in missing:
                self._write_shard(shard, read, bar)

    def _batches(self, shard: int) -> list[range]:
        """Returns the rows of a shard in batches."""
        size, first = self.options.batch_size, shard * self.options.shard_rows
        end = min(first + self.options.shard_rows, self.num_images)
        return [range(row, min(row + size, end)) for row in range(first, end, size)]

    def _record(self, shard: int) -> Path:
        """Returns where the record of a shard lies."""
        return self.out / RECORDS / f"shard{shard:03d}.json"

    def _is_done(self, shard: int) -> bool:
        """Returns whether a shard lies there as its record says; one that differs is named."""
        if not self._record(shard).exists():
            return False
        record = json.loads(self._record(shard).read_text())
        path = self.out / record["file"]
        if path.is_file() and file_sha256(path) == record["sha256"]:
            return True
        logger.warning("%s is missing or corrupt and is written again", path)
        return False

    def _write_shard(self, shard: int, read: Iterator[ReadBatch], bar: tqdm) -> None:
        """Encodes one shard from the batches that come next, and writes it with its record."""
        parts = [torch.empty(2, 0, *self.shape, dtype=STORED_DTYPES[self.options.dtype])]
        rows: list[int] = []
        unreadable: dict[str, str] = {}
        for batch in self._batches(shard):
            found = next(read)
            if found.images is not None:
                parts.append(self._encode(found.images, found.rows))
            rows += found.rows
            unreadable |= {self._name(row): why for row, why in found.unreadable.items()}
            bar.update(len(batch))
        latents, mirrored = torch.cat(parts, 1)
        path = write_shard(self.out, 0, shard, latents, mirrored, self.source.labels[rows])
        for name, why in unreadable.items():
            logger.warning("skipped %s, which cannot be read: %s", name, why)
        record = {
            "file": path.name,
            "rows": len(rows),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
            "unreadable": unreadable,
            "moments": asdict(ChannelMoments.of(latents)),
        }
        write_json(self._record(shard), record)

    def _encode(self, images: Tensor, rows: list[int]) -> Tensor:
        """Returns latents of images and mirrors (2, B, C, H, W), all finite."""
        latents = self.encode(images, rows)
        finite = latents.isfinite().all(0).flatten(1).all(1)
        if not finite.all():
            name = self._name(rows[int(finite.int().argmin())])
            kinds = f"precision={self.options.precision} and dtype={self.options.dtype}"
            raise ValueError(f"latents must be finite, those of {name} are not with {kinds}")
        return latents

    def _name(self, row: int) -> str:
        """Returns the path of an image below its folder."""
        return self.source.paths[row].relative_to(self.options.images).as_posix()

    def finish(self) -> dict[str, Any]:
        """Writes class names, statistics and manifest once all shards are done, and returns the manifest.

        Raises:
            ValueError: If no image could be read, or a latent channel is constant.
        """
        records = [json.loads(self._record(shard).read_text()) for shard in range(self.num_shards)]
        count = sum(record["rows"] for record in records)
        if not count:
            raise ValueError(f"at least one image must be readable, none of {self.num_images} is")
        moments = ChannelMoments.joined(ChannelMoments(**record["moments"]) for record in records)
        std = moments.std()
        manifest = self.fixed | {
            "vae": self.options.vae,
            "vae_config": self.vae.config,
            "images": str(Path(self.options.images).resolve()),
            "listed": self.num_images,
            "encoded": count,
            "unreadable": {image: why for record in records for image, why in record["unreadable"].items()},
            "shape": self.shape,
            "class_names": self.source.class_names,
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
        write_json(self.out / MANIFEST, manifest)
        return manifest


def _open_folder(options: EncodingOptions) -> Any:
    """Returns the folder of images; an error names it as the command does."""
    try:
        return ImageFolder(ImagesOptions(path=options.images, image_size=options.image_size))
    except ValueError as error:
        raise ValueError(str(error).replace("data.path", "--images")) from error
