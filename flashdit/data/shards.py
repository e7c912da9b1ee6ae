"""Latent shards in LightningDiT's layout: write, index, read one row, statistics."""

from __future__ import annotations

import bisect
import json
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashdit.files import write_atomically

STATISTICS = "latents_stats.pt"
CLASS_NAMES = "class_names.json"
STATISTICS_ROWS = 10_000


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
    path = folder / f"latents_rank{rank:02d}_shard{number:03d}.safetensors"
    tensors = {"latents": latents, "latents_flip": latents_flip, "labels": labels}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    return path


def write_statistics(folder: Path, mean: Tensor, std: Tensor) -> None:
    """Writes per-channel mean and std, (1, C, 1, 1) each, beside the shards."""
    statistics = {"mean": mean, "std": std}
    write_atomically(folder / STATISTICS, lambda temporary: torch.save(statistics, temporary))


class LatentShards:
    """Rows of a folder of shards, memory-mapped: each shard is opened once.

    Args:
        folder: A folder of `latents_rankRR_shardSSS.safetensors`.

    Attributes:
        labels: (N,) int64.
        class_names: One per class, from `class_names.json` where it lies beside the shards.
        shape: (C, H, W) of one latent.

    Raises:
        ValueError: If there is no shard, or one cannot be read.
    """

    mirrors = True

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("latents_rank*_shard*.safetensors"))
        if not self.paths:
            raise ValueError(f"data.path must hold latents_rankRR_shardSSS.safetensors, got none in {folder}")
        self.folder = folder
        self.files: dict[Path, safe_open] = {}
        labels = [self._index(path) for path in self.paths]
        self.labels = torch.cat(labels).long()
        self.ends = list(accumulate(map(len, labels)))
        self.shape = tuple(self.files[self.paths[0]].get_slice("latents").get_shape()[1:])
        names = folder / CLASS_NAMES
        count = int(self.labels.max()) + 1
        self.class_names = json.loads(names.read_text()) if names.exists() else None
        self.num_classes = len(self.class_names) if self.class_names else count

    def _index(self, path: Path) -> Tensor:
        """Opens a shard, checks that its parts agree and returns its labels."""
        try:
            file = self._file(path)
            labels = file.get_tensor("labels")
            shapes = [tuple(file.get_slice(name).get_shape()) for name in ("latents", "latents_flip")]
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"a shard must be a readable safetensors file, {path} is not: {error}"
            ) from error
        if shapes[0] != shapes[1] or shapes[0][0] != len(labels):
            raise ValueError(f"a shard's parts must agree, {path} has {shapes} and {len(labels)} labels")
        return labels

    def _file(self, path: Path) -> safe_open:
        """Returns the open shard, opening it on first use in this process."""
        if path not in self.files:
            self.files[path] = safe_open(path, "pt").__enter__()
        return self.files[path]

    def __getstate__(self) -> dict:
        """Leaves the open files behind: a worker process opens its own."""
        return self.__dict__ | {"files": {}}

    def __len__(self) -> int:
        return self.ends[-1]

    def latent(self, index: int, mirrored: bool = False) -> Tensor:
        """Returns one VAE latent (C, H, W), float32."""
        shard = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[shard - 1] if shard else 0)
        name = "latents_flip" if mirrored else "latents"
        return self._file(self.paths[shard]).get_slice(name)[row : row + 1][0].float()

    def sample(self) -> Tensor:
        """Returns up to 10,000 evenly spaced latents (N, C, H, W), to take statistics from."""
        rows = torch.linspace(0, len(self) - 1, min(len(self), STATISTICS_ROWS)).long().tolist()
        return torch.stack([self.latent(row) for row in rows])

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Returns mean and std, (1, C, 1, 1) each, from the file beside the shards, if there is one."""
        path = self.folder / STATISTICS
        if not path.exists():
            return None
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return stored["mean"].float(), stored["std"].float()
