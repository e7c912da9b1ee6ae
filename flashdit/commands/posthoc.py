"""`flashdit posthoc RUN --width 0.1`: an average of any width, made after training from snapshots.

RUN/checkpoints/step_XXXXXXXX/ema_0.100/    the layout of `ema/` beside it: sample.py --ema ema_0.100 takes it
    posthoc.json                            width, updates, the snapshots it was made from, how far they miss
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashdit.shared.command import run_script
from flashdit.shared.files import write_atomically
from flashdit.shared.registry import unknown
from flashdit.shared.runs import find_checkpoint, list_checkpoints, read_state, step_folder
from flashdit.training.profiles import Profile, solve
from flashdit.training.snapshots import SNAPSHOTS, TRACKS, Snapshot, list_snapshots

ABOUT = "posthoc.json"
COARSE = 0.05  # of the profile; there the weights of a run are off by some 1e-3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(
        prog="flashdit posthoc",
        description="Makes averages of the weights of any width from the snapshots of a run that was trained "
        "with ema.power_widths=[0.05,0.10]. The profile error is how far the best sum of snapshots is from "
        "the wanted profile; more snapshots (ema.snapshot_every) make it smaller.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder")
    add(
        "--width",
        type=float,
        nargs="+",
        required=True,
        metavar="W",
        help="standard deviation of the profile relative to the length of training: above 0, below 0.289, "
        "three decimals at most",
    )
    add("--step", type=int, metavar="N", help="the checkpoint that it ends at (default: the latest)")
    add("--output", type=Path, metavar="DIR", help="folder to make ema_W/ in (default: the checkpoint)")
    return parser.parse_args(argv)


def checkpoint_of(run: Path, step: int | None) -> Path:
    """Returns the run's checkpoint of a step, or its latest one.

    Raises:
        ValueError: If the run has none there.
    """
    if step is None:
        return find_checkpoint(run)
    folder = step_folder(run, step)
    if folder not in list_checkpoints(run):
        raise unknown(f"checkpoint of {run}", folder.name, [path.name for path in list_checkpoints(run)])
    return folder


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


def reconstruct(checkpoint: Path, snapshots: Sequence[Snapshot], width: float, folder: Path) -> float:
    """Writes the average of a width as the checkpoint's `ema` lies there, and returns the profile's error.

    Args:
        checkpoint: Where the profile ends.
        snapshots: What it is made from.
        width: Of the profile.
        folder: Made whole or not at all; replaced if it is there.

    Raises:
        ValueError: If the width cannot be or the snapshots are of another model.
    """
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
        (temporary / ABOUT).write_text(json.dumps(about, indent=2) + "\n")

    write_atomically(folder, write)
    return missed


def _write_sum(
    template: Path, snapshots: Sequence[Snapshot], coefficients: Sequence[float], path: Path
) -> None:
    """Writes the tensors that a file has as sums over the snapshots, one tensor at a time, in float64."""
    with safe_open(template, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
        metadata = file.metadata()
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for snapshot, x in zip(snapshots, coefficients, strict=True):
        try:
            with safe_open(snapshot.path, "pt") as file:
                for name, total in sums.items():
                    total.add_(file.get_tensor(name).double(), alpha=x)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{snapshot.path} must hold the model of {template}: {error}") from error
    save_file({name: total.float() for name, total in sums.items()}, path, metadata)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the averages and says how well the snapshots make them."""
    arguments = parse(argv)
    checkpoint = checkpoint_of(arguments.run, arguments.step)
    snapshots = usable_snapshots(arguments.run, checkpoint)
    output = arguments.output or checkpoint
    table = Table("average", "profile error", "")
    for width in arguments.width:
        if width != round(width, 3):
            raise ValueError(
                f"--width must have three decimals at most, since it names a folder, got {width}"
            )
        name = f"ema_{width:.3f}"
        missed = reconstruct(checkpoint, snapshots, width, output / name)
        table.add_row(name, f"{missed:.2%}", "coarse: wants more snapshots" if missed > COARSE else "")
    Console().print(table)
    print(f"made from {len(snapshots)} snapshots, in {output}")


if __name__ == "__main__":
    run_script(main)
