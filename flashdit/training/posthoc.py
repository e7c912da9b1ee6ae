"""An average of any width, made after training: which sum of a run's snapshots comes nearest to it?

RUN/checkpoints/step_XXXXXXXX/ema_0.100/    the layout of `ema/` beside it
    posthoc.json                            width, updates, the snapshots it is made from, the profile's error
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flashdit.shared.files import write_atomically, write_checked_json
from flashdit.shared.runs import (
    CHECKSUMS,
    POSTHOC_FILE,
    check_whole,
    checksums,
    posthoc_checksums,
    read_state,
)
from flashdit.training.profiles import Profile, solve
from flashdit.training.snapshots import SNAPSHOTS, TRACKS, Snapshot, list_snapshots


def usable_snapshots(run: Path, checkpoint: Path) -> list[Snapshot]:
    """Returns the snapshots up to a checkpoint and its own tracks, none of a profile twice.

    Raises:
        ValueError: If there are none.
    """
    updates = read_state(checkpoint)["ema_updates"]
    found = [*list_snapshots(run / SNAPSHOTS), *list_snapshots(checkpoint / TRACKS)]
    usable = {snapshot.profile: snapshot for snapshot in found if snapshot.profile.updates <= updates}
    if not usable:
        raise ValueError(
            f"post-hoc averages need a run trained with ema.power_widths=[0.05,0.10], "
            f"got no snapshot for {checkpoint}"
        )
    return list(usable.values())


def check_average(folder: Path) -> None:
    """Raises ValueError unless a folder is new or an earlier average of `reconstruct`, which is replaced."""
    if folder.exists() and not (folder / POSTHOC_FILE).is_file():
        raise ValueError(
            f"--output must be a folder in which {folder.name} is new or an earlier average, {folder} is "
            "something else"
        )
    known = posthoc_checksums(folder / POSTHOC_FILE) if folder.exists() else {}
    others = {path.name for path in folder.iterdir()} - {POSTHOC_FILE, *known} if known else ()
    if others:
        raise ValueError(f"{folder} is replaced as a whole, and holds {', '.join(sorted(others))} besides")


def reconstruct(checkpoint: Path, snapshots: Sequence[Snapshot], width: float, folder: Path) -> float:
    """Writes the average of a width as the checkpoint's `ema` lies there, and returns the profile's error.

    Args:
        checkpoint: Where the profile ends.
        snapshots: What it is made from.
        width: Of the profile.
        folder: Made whole or not at all; replaced if it is there.

    Raises:
        ValueError: If the width is invalid, the snapshots are of another model, or what is read is damaged.
    """
    check_whole(checkpoint, "ema")
    wanted = Profile(width=width, updates=read_state(checkpoint)["ema_updates"])
    coefficients, missed = solve([snapshot.profile for snapshot in snapshots], wanted)
    about = {
        "width": width,
        "updates": wanted.updates,
        "profile_error": missed,
        "snapshots": {
            snapshot.path.name: float(x) for snapshot, x in zip(snapshots, coefficients, strict=True)
        },
    }

    def write(temporary: Path) -> None:
        temporary.mkdir()
        for path in sorted((checkpoint / "ema").iterdir()):
            if path.suffix == ".safetensors":
                _write_sum(path, snapshots, coefficients.tolist(), temporary / path.name)
            else:
                shutil.copyfile(path, temporary / path.name)
        write_checked_json(temporary / POSTHOC_FILE, {**about, CHECKSUMS: checksums(temporary)})

    write_atomically(folder, write)
    return missed


def _write_sum(
    template: Path, snapshots: Sequence[Snapshot], coefficients: Sequence[float], path: Path
) -> None:
    """Writes the tensors of a file as sums over the snapshots, in float64, and its counters as they are."""
    with safe_open(template, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        fractions = {name: part.get_shape() for name, part in slices.items() if "F" in part.get_dtype()}
        counters = {name: file.get_tensor(name) for name in slices if name not in fractions}  # as I64
        metadata = file.metadata()
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in fractions.items()}
    for snapshot, x in zip(snapshots, coefficients, strict=True):
        average = snapshot.load()
        for name, total in sums.items():
            if name not in average or average[name].shape != total.shape:
                raise ValueError(f"{snapshot.path} must hold the model of {template}, it has another {name}")
            total.add_(average[name].double(), alpha=x)
    save_file(counters | {name: total.float() for name, total in sums.items()}, path, metadata)
