"""Latent shards in LightningDiT's layout: write, check, read rows, statistics."""

from __future__ import annotations

import bisect
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashdit.data.manifest import MANIFEST, check_files, read_class_names, read_manifest
from flashdit.shared.files import write_atomically
from flashdit.shared.weights import read_content

SHARDS = "latents_rank*_shard*.safetensors"
TENSORS = ("latents", "latents_flip", "labels")
STATISTICS = "latents_stats.pt"
CLASS_NAMES_FILE = "class_names.json"
STATISTICS_ROWS = 10_000


def shard_name(rank: int, number: int) -> str:
    """Returns the file name of a shard."""
    return f"latents_rank{rank:02d}_shard{number:03d}.safetensors"


def write_shard(
    folder: Path, rank: int, number: int, latents: Tensor, latents_flip: Tensor, labels: Tensor
) -> Path:
    """Writes one shard (temporary name, then renamed) and returns its path.

    Args:
        folder: Where the shards lie; made if need be.
        rank: Process that writes.
        number: Shard of this process.
        latents: VAE latents (N, C, H, W).
        latents_flip: Latents of the mirrored images (N, C, H, W).
        labels: (N,) int64.
    """
    path = folder / shard_name(rank, number)
    tensors = dict(zip(TENSORS, (latents, latents_flip, labels), strict=True))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    return path


def write_statistics(folder: Path, mean: Tensor, std: Tensor) -> None:
    """Writes per-channel mean and std, (1, C, 1, 1) each, beside the shards."""
    statistics = {"mean": mean, "std": std}
    write_atomically(folder / STATISTICS, lambda temporary: torch.save(statistics, temporary))


class LatentShards:
    """Rows of a folder of shards, memory-mapped: each shard is opened once in each process.

    Args:
        folder: A folder of `latents_rankRR_shardSSS.safetensors`.

    Attributes:
        labels: (N,) int64.
        class_names: One per class, from `class_names.json` beside the shards or else from the manifest.
        shape: (C, H, W) of one latent.
        manifest: What `encode_latents.py` says of the shards; None for shards from elsewhere.

    Raises:
        ValueError: If there is no shard, or one cannot be read or is not what the manifest says.
    """

    mirrors = True

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob(SHARDS))
        self.folder, self.manifest = folder, read_manifest(folder)
        if self.manifest is not None:
            check_files(folder, self.manifest, self.paths)
        if not self.paths:
            raise ValueError(f"data.path must hold latents_rankRR_shardSSS.safetensors, got none in {folder}")
        self.mapped: dict[int, dict[str, Tensor]] = {}
        labels = [self._index(shard) for shard in range(len(self.paths))]
        self.labels = torch.cat(labels).long()
        self.ends = list(accumulate(map(len, labels)))
        self.shape = tuple(self._shard(0)["latents"].shape[1:])
        names = folder / CLASS_NAMES_FILE
        known = (self.manifest or {}).get("class_names")
        self.class_names: list[str] | None = read_class_names(names) if names.exists() else known
        if known and len({*(self.class_names or ())}) != len(known):
            raise ValueError(
                f"{names} must have a name for each of the {len(known)} classes of {MANIFEST}, got "
                f"{len({*(self.class_names or ())})}"
            )
        self.num_classes = len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    def _index(self, shard: int) -> Tensor:
        """Opens a shard, checks that it fits and returns its labels."""
        path = self.paths[shard]
        try:
            tensors = self._shard(shard)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"a shard must be a readable safetensors file, {path} is not: {error}"
            ) from error
        latents, mirrored, labels = (tensors[name] for name in TENSORS)
        if latents.shape != mirrored.shape or len(latents) != len(labels):
            shapes = [tuple(part.shape) for part in (latents, mirrored)]
            raise ValueError(f"a shard's parts must agree, {path} has {shapes} and {len(labels)} labels")
        expected = self._shard(0)["latents"].shape[1:]
        if latents.shape[1:] != expected:
            got = tuple(latents.shape[1:])
            raise ValueError(f"all shards must hold latents {tuple(expected)}, {path} holds {got}")
        return labels

    def _shard(self, shard: int) -> dict[str, Tensor]:
        """Returns the tensors of a shard, mapped into memory on first use in this process."""
        if shard not in self.mapped:
            with safe_open(self.paths[shard], "pt") as file:
                self.mapped[shard] = {name: file.get_tensor(name) for name in TENSORS}
        return self.mapped[shard]

    @property
    def vae_identity(self) -> str | None:
        """The identity of the VAE that made the latents; None where no manifest tells."""
        return self.manifest["vae_identity"] if self.manifest else None

    @property
    def compared(self) -> str:
        """What was compared of the files with what they should be, in words: reading all bytes takes long."""
        if self.manifest is None:
            return f"by their tensors' shapes, as there is no {MANIFEST}"
        return f"by name and size with {MANIFEST} (flashdit encode --verify compares their bytes)"

    def identity(self) -> dict[str, Any]:
        """Returns what the shards are known by: classes, names, and checksums or else sizes."""
        listed = {shard["file"]: shard["sha256"] for shard in (self.manifest or {}).get("shards", ())}
        files = {path.name: listed.get(path.name, path.stat().st_size) for path in self.paths}
        return {"classes": self.class_names, "files": files}

    def __getstate__(self) -> dict:
        """Leaves the mapped files behind: a worker process maps its own."""
        return self.__dict__ | {"mapped": {}}

    def __len__(self) -> int:
        return len(self.labels)

    def latent(self, index: int, mirrored: bool = False) -> Tensor:
        """Returns one VAE latent (C, H, W), float32."""
        return self._row(index, mirrored).to(torch.float32, copy=True)

    def read(self, indices: Tensor, mirrored: Tensor) -> Tensor:
        """Returns VAE latents (B, C, H, W), float32, of rows (B,); `mirrored` (B,) tells which mirrors.

        They are copied in the order in which they lie on the disk.
        """
        latents = torch.empty(len(indices), *self.shape)
        order = indices.argsort()
        for place, index, flip in zip(
            order.tolist(), indices[order].tolist(), mirrored[order].tolist(), strict=True
        ):
            latents[place] = self._row(index, flip)
        return latents

    def _row(self, index: int, mirrored: bool) -> Tensor:
        """Returns one row (C, H, W) of a mapped shard as it is stored."""
        shard = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[shard - 1] if shard else 0)
        return self._shard(shard)["latents_flip" if mirrored else "latents"][row]

    def sample(self) -> Tensor:
        """Returns up to 10,000 evenly spaced latents (N, C, H, W), to take statistics from."""
        rows = torch.linspace(0, len(self) - 1, min(len(self), STATISTICS_ROWS)).long()
        return self.read(rows, torch.zeros(len(rows), dtype=torch.bool))

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Returns mean and std, (1, C, 1, 1) each, as the manifest or the file beside the shards has them."""
        path = self.folder / (STATISTICS if self.manifest is None else MANIFEST)
        if not path.exists():
            return None
        stored = read_content(path) if self.manifest is None else self.manifest
        try:
            mean, std = (torch.as_tensor(stored[name]).float() for name in ("mean", "std"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"statistics must be a mean and a std, {path} has none: {error}") from error
        if not mean.numel() == std.numel() == self.shape[0]:
            raise ValueError(
                f"mean and std must be of the {self.shape[0]} channels of the latents, {path} has "
                f"{mean.numel()} and {std.numel()}"
            )
        return mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)
