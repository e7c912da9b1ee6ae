"""Samples images from a trained FlashDiT: PNGs, a labelled grid, an npz for evaluators, the recipe.

On several processes: `accelerate launch sample.py …` or `torchrun --nproc_per_node N sample.py …`. A run that
was interrupted continues when the same command is given again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from flashdit.commands.arguments import add_sampling, open_generator, options_from
from flashdit.sampling.checkpoint import CheckpointGenerator
from flashdit.sampling.classes import ALL, class_ids, equal_shares, random_labels
from flashdit.sampling.folder import (
    FORMATS,
    GRID,
    GRID_CLASSES,
    PER_CLASS,
    SampleFolder,
    digest,
    make_recipe,
)
from flashdit.sampling.options import SamplingOptions
from flashdit.shared.command import add_device, resolve_device
from flashdit.shared.registry import unknown

LABELS = ("balanced", "random")
PATIENCE = timedelta(days=1)  # between the first process that is done and the last


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", help="checkpoint folder or run (default: the newest run)")
    add(
        "--ema", default="ema", metavar="WEIGHTS", help="ema (default), model for the raw weights, or another"
    )
    add(
        "--class",
        dest="classes",
        nargs="+",
        metavar="CLASS",
        help=f"ids or names, or {ALL} (default: the first ten, or all where --num-images says how many)",
    )
    add("--labels", default="balanced", help="balanced: equal shares, in order (default); random: drawn")
    add("--num-images", type=int, help=f"in all, shared among the classes (default: {PER_CLASS} a class)")
    add("--batch-size", type=int, help="images at a time; moves no value by more than a grey level")
    add("--output", type=Path, help="folder for the images (default: in the run's samples/)")
    add("--format", default="both", help=f"{' or '.join(FORMATS)} (default: both)")
    add_device(parser)
    add_sampling(parser)
    return parser.parse_args(argv)


def make_labels(arguments: argparse.Namespace, class_names: Sequence[str], seed: int) -> Tensor:
    """Returns the label of each image: the classes in equal shares and in order, or at random."""
    if arguments.labels not in LABELS:
        raise unknown("labels", arguments.labels, LABELS)
    every = range(len(class_names)) if arguments.num_images else range(min(GRID_CLASSES, len(class_names)))
    ids = class_ids(arguments.classes, class_names) if arguments.classes else list(every)
    ids = ids or [0]  # the null label of a model without classes
    count = PER_CLASS * len(ids) if arguments.num_images is None else arguments.num_images
    if count < 1:
        raise ValueError(f"--num-images must be at least 1, got {count}")
    return equal_shares(count, ids) if arguments.labels == "balanced" else random_labels(count, ids, seed)


def open_folder(
    arguments: argparse.Namespace, generator: CheckpointGenerator, options: SamplingOptions
) -> SampleFolder:
    """Returns the folder to fill, checked; nothing is written yet."""
    labels = make_labels(arguments, generator.class_names, options.seed)
    recipe = make_recipe(
        generator,
        labels,
        options,
        order=arguments.labels,
        form=arguments.format,
    )
    name = f"cfg_{options.cfg_scale:g}_seed_{options.seed}_{digest(recipe, labels)}"
    path = arguments.output or generator.run_dir / "samples" / name
    return SampleFolder(path, recipe, labels, generator.class_names)


def sample(
    folder: SampleFolder, generator: CheckpointGenerator, options: SamplingOptions, state: PartialState
) -> None:
    """Makes what is missing of the folder, each process its share, and puts it together."""
    if state.is_main_process and not folder.is_finished:
        folder.open()
    state.wait_for_everyone()
    missing = folder.missing()
    state.wait_for_everyone()  # no process adds to the folder before all know what is missing
    mine = missing[state.process_index :: state.num_processes]
    total = len(folder.labels)
    bar = tqdm(
        total=total,
        initial=total - len(missing),
        desc="sample",
        unit="image",
        disable=not state.is_main_process,
    )
    with bar:  # the first process counts for all: their shares are equal
        for batch in generator.generate(folder.labels, options, mine):
            folder.add(batch)
            bar.update(min(len(batch.ids) * state.num_processes, total - bar.n))
    state.wait_for_everyone()
    if state.is_main_process:
        folder.finish()


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, checks it, samples, and says where the grid lies."""
    arguments = parse(argv)
    arguments.device = resolve_device(arguments.device)
    state = PartialState(cpu=torch.device(arguments.device).type == "cpu", timeout=PATIENCE)
    device = arguments.device if state.num_processes == 1 or state.device is None else state.device
    generator = open_generator(arguments, device)
    options = options_from(arguments, generator)
    folder = open_folder(arguments, generator, options)
    sample(folder, generator, options, state)
    if state.is_main_process:
        recipe = folder.read_recipe()
        about = f"{len(folder.labels)} images, {recipe['nfe']:g} model evaluations each"
        print(f"{about}: {folder.path / GRID}")
    state.destroy_process_group()
