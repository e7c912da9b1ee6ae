"""Snapshots of the power-function averages: a safetensors file for each width and step.

RUN/ema_snapshots/step_XXXXXXXX_std0.050.safetensors    every `ema.snapshot_every` steps, all kept
CHECKPOINT/ema_tracks/step_XXXXXXXX_std0.050.safetensors    what a resume goes on with
They are float32: over 16 snapshots of two widths float16 rounds to 2e-4 of the weights and 2e-3 of their
distance to the average, and bfloat16 to eight times that; the reconstruction is held to 1e-3.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashdit.shared.files import write_atomically
from flashdit.shared.weights import tensors_crc32
from flashdit.training.profiles import Profile

SNAPSHOTS = "ema_snapshots"
TRACKS = "ema_tracks"
SNAPSHOT_NAME = re.compile(r"step_(\d{8,})_std\d\.\d{3}\.safetensors")
SNAPSHOT_KEY = (
    "profile"  # the one key of the files' metadata: several would be written in an order that varies
)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A saved average."""

    path: Path
    step: int
    profile: Profile
    crc32: str | None
    """Of the tensors; None in a file of before there was one."""

    def load(self) -> dict[str, Tensor]:
        """Returns the average by name.

        Raises:
            ValueError: If it is not what was written.
        """
        try:
            average = load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} is damaged: {error}") from error
        if self.crc32 is not None and tensors_crc32(average) != self.crc32:
            raise ValueError(f"{self.path} is damaged: its checksum is not the one that it was written with")
        return average


def write_snapshots(folder: Path, step: int, tracks: Mapping[Profile, Mapping[str, Tensor]]) -> None:
    """Writes the averages of a step, each file whole or not at all."""
    for profile, average in tracks.items():
        path = folder / f"step_{step:08d}_std{profile.width:.3f}.safetensors"
        tensors = {name: value.contiguous() for name, value in average.items()}
        crc32 = tensors_crc32(tensors)
        about = json.dumps({"step": step, "width": profile.width, "updates": profile.updates, "crc32": crc32})
        write_atomically(
            path, lambda temporary, t=tensors, a=about: save_file(t, temporary, {SNAPSHOT_KEY: a})
        )


def list_snapshots(folder: Path) -> list[Snapshot]:
    """Returns the snapshots of a folder by step and width; only their headers are read.

    Raises:
        ValueError: If a file cannot be read or is no snapshot.
    """
    return [_read_header(path) for path in sorted(folder.glob("step_*.safetensors"))]


def _read_header(path: Path) -> Snapshot:
    """Returns what a snapshot says of itself."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[SNAPSHOT_KEY])
        profile = Profile(width=about["width"], updates=about["updates"])
        return Snapshot(path=path, step=about["step"], profile=profile, crc32=about.get("crc32"))
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"a snapshot of the averages must be whole, {path} is not: {error}") from error


def read_tracks(folder: Path) -> dict[Profile, dict[str, Tensor]]:
    """Returns the averages that a checkpoint holds, none where it has none."""
    return {snapshot.profile: snapshot.load() for snapshot in list_snapshots(folder)}


def drop_later(folder: Path, step: int) -> None:
    """Removes the snapshots after a step: an earlier attempt's, which the run is about to make again."""
    for path in folder.glob("step_*.safetensors"):
        found = SNAPSHOT_NAME.fullmatch(path.name)
        if found is not None and int(found[1]) > step:
            path.unlink()
