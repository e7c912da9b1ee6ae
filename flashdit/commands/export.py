"""Writes a run's checkpoint as a diffusers pipeline, with its card: `flashdit export RUN OUT`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

INDEX = "model_index.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("run", help="a run, or one of its checkpoint folders")
    add("out", type=Path, help="folder of the pipeline: new, or an earlier export")
    add("--ema", default="ema", metavar="WEIGHTS", help="ema (default), model, or another")
    add("--vae", help="folder of the VAE, where it is no longer where it was in training")
    add("--name", help="title of the model card (default: the run's name)")
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and not (arguments.out / INDEX).is_file():
        raise ValueError(f"OUT must be a new folder or an earlier export, got {arguments.out}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Exports a run or checkpoint to a folder that `FlashDiTPipeline.from_pretrained` reads."""
    arguments = parse(argv)
    from flashdit.sampling.checkpoint import load_generator
    from flashdit.sampling.export import make_pipeline
    from flashdit.shared.files import write_atomically

    generator = load_generator(arguments.run, "cpu", arguments.vae, arguments.ema)
    generator.space.need_vae()
    pipeline = make_pipeline(generator, arguments.name or f"FlashDiT {generator.run_dir.absolute().name}")
    write_atomically(arguments.out, pipeline.save_pretrained)
    print(f'{arguments.out}: FlashDiTPipeline.from_pretrained("{arguments.out}")')
