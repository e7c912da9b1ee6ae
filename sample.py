"""Samples images from a trained FlashDiT: PNGs, a labelled grid, an npz for evaluators, the recipe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flashdit.cli import add_device, add_sampling, run_script, sampling_options
from flashdit.files import write_atomically, write_json
from flashdit.generate import CheckpointGenerator, SamplingOptions, class_ids, load_generator
from flashdit.pictures import labelled_grid, rows_by_class, save_png

PER_CLASS = 10
GRID_CLASSES = 10
RECIPE = "recipe.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", help="checkpoint folder or run (default: the newest run)")
    add("--class", dest="classes", nargs="+", help="class ids or names (default: the first ten classes)")
    add("--num-images", type=int, help=f"in all, shared among the classes (default: {PER_CLASS} a class)")
    add("--batch-size", type=int, help="images at a time; changes no image")
    add("--output", type=Path, help="folder for the images (default: in the run's samples/)")
    add_device(parser)
    add_sampling(parser)
    return parser.parse_args(argv)


def make_labels(arguments: argparse.Namespace, class_names: Sequence[str]) -> Tensor:
    """Returns the label of each image: the classes in equal shares, in order."""
    wanted = arguments.classes or [str(i) for i in range(min(GRID_CLASSES, len(class_names)))]
    ids = torch.tensor(class_ids(wanted, class_names))
    count = PER_CLASS * len(ids) if arguments.num_images is None else arguments.num_images
    if count < 1:
        raise ValueError(f"--num-images must be at least 1, got {count}")
    return ids[torch.arange(count) * len(ids) // count]


def write_images(
    folder: Path, generator: CheckpointGenerator, labels: Tensor, options: SamplingOptions
) -> None:
    """Writes PNGs, grid.png, samples.npz and recipe.json into a new folder."""
    folder.mkdir(parents=True)
    recipe = {**generator.recipe(), "sampling": asdict(options), "nfe": generator.nfe(options)}
    write_json(folder / RECIPE, recipe | {"num_images": len(labels), "classes": labels.unique().tolist()})
    recipe_text = json.dumps(recipe)
    images = []
    with tqdm(total=len(labels), desc="sample", unit="image") as bar:
        for batch in generator.generate(labels, options):
            for i, label, image in zip(batch.ids.tolist(), batch.labels.tolist(), batch.images, strict=True):
                about = {"class": generator.class_names[label], "recipe": recipe_text}
                save_png(image, folder / f"{i:06d}.png", about)
            images.append(batch.images)
            bar.update(len(batch.images))
    pictures = torch.cat(images)
    arrays = pictures.permute(0, 2, 3, 1).numpy(), labels.numpy()
    np.savez(folder / "samples.npz", *arrays)
    first = torch.cat(
        [(labels == label).nonzero()[:PER_CLASS, 0] for label in labels.unique()[:GRID_CLASSES]]
    )
    title = f"step {generator.step}, {options}"
    rows = rows_by_class(pictures[first], labels[first], generator.class_names, PER_CLASS)
    labelled_grid(rows, title).save(folder / "grid.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, checks it, samples, and says where the grid lies."""
    arguments = parse(argv)
    generator = load_generator(arguments.checkpoint, arguments.device, arguments.vae)
    options = sampling_options(arguments, generator)
    labels = make_labels(arguments, generator.class_names)
    classes = "-".join(arguments.classes or ["all"])
    name = f"class_{classes}_cfg_{options.cfg_scale:g}_seed_{options.seed}"
    folder = arguments.output or generator.run_dir / "samples" / name
    if folder.exists() and not (folder / RECIPE).is_file():
        raise ValueError(f"--output must be a new folder or one of earlier samples, got {folder}")
    write_atomically(folder, lambda temporary: write_images(temporary, generator, labels, options))
    print(f"{len(labels)} images, {generator.nfe(options)} model evaluations each: {folder / 'grid.png'}")


if __name__ == "__main__":
    run_script(main)
