"""Samples images from a trained FlashDiT: PNGs, a labelled grid, an npz for evaluators, the recipe.

On several processes: `accelerate launch sample.py …` or `torchrun --nproc_per_node N sample.py …`. A run that
was interrupted continues when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta

from flashdit.commands.arguments import (
    add_sampling,
    add_weights,
    chosen_sampling,
    open_generator,
    path,
    path_text,
)
from flashdit.shared.command import CommandParser, add_device, resolve_device
from flashdit.shared.registry import counted

SAMPLE_TIMEOUT = timedelta(days=1)  # between the first process that is done and the last


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=path_text, help="checkpoint folder or run (default: the newest run)")
    add_weights(parser)
    add(
        "--class",
        dest="classes",
        nargs="+",
        metavar="CLASS",
        help="ids or names, or all (default: the first ten, or all where --num-images says how many)",
    )
    add("--labels", default="balanced", help="balanced: equal shares, in order (default); random: drawn")
    add("--num-images", type=int, help="in all, shared among the classes (default: 10 a class)")
    add("--batch-size", type=int, help="images at a time; moves no value by more than a grey level")
    add("--output", type=path, help="folder for the images (default: in the run's samples/)")
    add("--format", default="both", help="png, npz or both (default: both)")
    add_device(parser)
    add_sampling(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, checks it, samples, and prints where the grid is."""
    arguments = parse(argv)
    device = resolve_device(arguments.device)
    sample(arguments, device)


def sample(arguments: argparse.Namespace, device: str) -> None:
    """Samples on all processes."""
    from accelerate import PartialState

    from flashdit.sampling.classes import choose_labels
    from flashdit.sampling.folder import GRID
    from flashdit.sampling.run import fill, open_folder
    from flashdit.shared.process import check_processes

    state = PartialState(cpu=device.startswith("cpu"), timeout=SAMPLE_TIMEOUT)
    check_processes(state.num_processes)
    where = device if state.num_processes == 1 or state.device is None else state.device
    generator = open_generator(arguments, where)
    options = chosen_sampling(arguments, generator)
    labels = choose_labels(
        generator.class_names, arguments.classes, arguments.num_images, arguments.labels, options.seed
    )
    folder = open_folder(
        generator, labels, options, arguments.output, order=arguments.labels, form=arguments.format
    )
    fill(folder, generator, options, state)
    if state.is_main_process:
        recipe = folder.read_recipe()
        about = f"{counted(len(folder.labels), 'image')}, {counted(recipe['nfe'], 'model evaluation')} each"
        print(f"{about}: {folder.path / GRID}")
    state.destroy_process_group()
