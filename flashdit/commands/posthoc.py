"""Makes averages of any width after training, from snapshots: `flashdit posthoc RUN --width 0.1`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from flashdit.commands.arguments import path
from flashdit.shared.command import CommandParser, open_console
from flashdit.shared.registry import unknown

COARSE = 0.05  # of the profile; there the weights of a run are off by some 1e-3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = CommandParser(
        description="Makes averages of the weights of any width from the snapshots of a run that was trained "
        "with ema.power_widths=[0.05,0.10]. The profile error is how far the best sum of snapshots is from "
        "the wanted profile; more snapshots (ema.snapshot_every) make it smaller.",
    )
    add = parser.add_argument
    add("run", type=path, metavar="RUN", help="the run's folder")
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
    add("--output", type=path, metavar="DIR", help="folder to make ema_W/ in (default: the checkpoint)")
    return parser.parse_args(argv)


def checkpoint_of(run: Path, step: int | None) -> Path:
    """Returns the run's checkpoint of a step, or its latest one.

    Raises:
        ValueError: If the run has none there.
    """
    from flashdit.shared.runs import find_checkpoint, list_checkpoints, step_folder

    if step is None:
        return find_checkpoint(run, "RUN")
    folder = step_folder(run, step)
    if folder not in list_checkpoints(run):
        raise unknown(f"checkpoint of {run}", folder.name, [path.name for path in list_checkpoints(run)])
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the averages and says how well the snapshots make them."""
    arguments = parse(argv)
    from rich.table import Table

    from flashdit.shared.locks import only_writer
    from flashdit.shared.paths import check_outside
    from flashdit.shared.runs import images_of
    from flashdit.training.checkpoint import stored_config
    from flashdit.training.posthoc import check_average, reconstruct, usable_snapshots

    for width in arguments.width:
        if width != round(width, 3):
            raise ValueError(
                f"--width must have three decimals at most, since it names a folder, got {width}"
            )
    checkpoint = checkpoint_of(arguments.run, arguments.step)
    snapshots = usable_snapshots(arguments.run, checkpoint)
    output = arguments.output or checkpoint
    check_outside(output, images_of(stored_config(checkpoint)), "--output", f"the run {arguments.run}")
    table = Table("average", "profile error", "")
    for width in arguments.width:
        name = f"ema_{width:.3f}"
        with only_writer(output / name, is_file=True):
            check_average(output / name)
            missed = reconstruct(checkpoint, snapshots, width, output / name)
        table.add_row(name, f"{missed:.2%}", "coarse: wants more snapshots" if missed > COARSE else "")
    open_console().print(table)
    print(f"made from {len(snapshots)} snapshots, in {output}")
