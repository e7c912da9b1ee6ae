"""Trains an autoencoder on one's own images, for `latents.vae` and `flashdit encode --vae`.

A ready autoencoder that was trained on millions of photographs is better for photographs. One's own is for
pictures that look otherwise (drawings, glyphs, spectra), for small images, or where none may be fetched.
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from typing import Any

from flashdit.commands.arguments import path_text
from flashdit.shared.command import CommandParser

NAMED = {  # option → the key that it sets
    "images": "data.path",
    "image_size": "data.image_size",
    "factor": "autoencoder.factor",
    "channels": "autoencoder.channels",
    "out": "run.dir",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--config",
        type=path_text,
        metavar="YAML|NAME",
        help="a file or a shipped configuration (default: autoencoder/small)",
    )
    add("--images", type=path_text, metavar="DIR", help="folder of images, as data.name=images data.path=DIR")
    add("--image-size", type=int, help="side they are cropped to, in pixels (data.image_size)")
    add("--factor", type=int, help="pixels of a side that one latent stands for (autoencoder.factor)")
    add("--channels", type=int, help="numbers of a latent (autoencoder.channels)")
    add("--out", type=path_text, metavar="DIR", help="the run's folder; the same folder resumes (run.dir)")
    add("overrides", nargs="*", metavar="key=value", help="such as training.steps=5000")
    return parser.parse_intermixed_args(argv)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what the options set, by key.

    Raises:
        ValueError: If an override sets the same.
    """
    given = {name: value for name in NAMED if (value := getattr(arguments, name)) is not None}
    for name, value in given.items():
        if f"{NAMED[name]}=" in (f"{text.partition('=')[0]}=" for text in arguments.overrides):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is {NAMED[name]}: give one of them, got both")
        if "${" in str(value):
            raise ValueError(
                f"a path with ${{ stands for another key of a configuration: rename it, got {value}"
            )
    values = {NAMED[name]: value for name, value in given.items()}
    return values if arguments.images is None else {"data.name": "images", **values}


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and says where the autoencoder lies and how good it is."""
    arguments = parse(argv)
    from flashdit.autoencoder.config import load_autoencoder_config
    from flashdit.autoencoder.task import AutoencoderTrainer
    from flashdit.shared.process import keep_freed_memory

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_autoencoder_config(arguments.config, arguments.overrides, options_of(arguments))
    trainer = AutoencoderTrainer(config)
    if trainer.device.type == "cpu":
        keep_freed_memory()
    run_dir = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(
            f"trained to step {trainer.step}: {run_dir}; use it by {shlex.join([f'latents.vae={run_dir}'])}"
        )
    trainer.accelerator.end_training()
