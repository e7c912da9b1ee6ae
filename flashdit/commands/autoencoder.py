"""Trains an autoencoder on one's own images, for `latents.vae` and `flashdit encode --vae`.

A ready autoencoder that was trained on millions of photographs is better for photographs. One's own is for
pictures that look otherwise (drawings, glyphs, spectra), for small images, or where none may be fetched.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

NAMED = {  # option → the key that it sets
    "image_size": "data.image_size",
    "factor": "autoencoder.factor",
    "channels": "autoencoder.channels",
    "out": "run.dir",
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--config",
        metavar="YAML|NAME",
        help="a file or a shipped configuration (default: autoencoder/small)",
    )
    add("--images", metavar="DIR", help="folder of images, as data.name=images data.path=DIR")
    add("--image-size", type=int, help="side they are cropped to, in pixels (data.image_size)")
    add("--factor", type=int, help="pixels of a side that one latent stands for (autoencoder.factor)")
    add("--channels", type=int, help="numbers of a latent (autoencoder.channels)")
    add("--out", metavar="DIR", help="the run's folder; the same folder resumes (run.dir)")
    add("overrides", nargs="*", metavar="key=value", help="such as training.steps=5000")
    return parser.parse_intermixed_args(argv)


def overrides_of(arguments: argparse.Namespace) -> list[str]:
    """Returns what the options and the overrides change, as `key=value` texts."""
    given = [] if arguments.images is None else ["data.name=images", f"data.path={arguments.images}"]
    values = {key: getattr(arguments, name) for name, key in NAMED.items()}
    given += [f"{key}={value}" for key, value in values.items() if value is not None]
    return given + arguments.overrides


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and says where the autoencoder lies and how good it is."""
    arguments = parse(argv)
    from flashdit.autoencoder.config import load_autoencoder_config
    from flashdit.autoencoder.task import AutoencoderTrainer
    from flashdit.shared.process import keep_freed_memory

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_autoencoder_config(arguments.config, overrides_of(arguments))
    trainer = AutoencoderTrainer(config)
    if trainer.device.type == "cpu":
        keep_freed_memory()
    run_dir = trainer.fit()
    if trainer.accelerator.is_main_process:
        print(f"trained to step {trainer.step}: {run_dir}; use it by latents.vae={run_dir}")
    trainer.accelerator.end_training()
