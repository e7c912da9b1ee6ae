"""Encodes a folder of images by a VAE into latent shards, on as many processes as were launched."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import MISSING, fields
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState

from flashdit.data.encode import AUTOCAST, DTYPES
from flashdit.data.encode_folder import EncodingOptions, FolderEncoding
from flashdit.data.manifest import MANIFEST, verify
from flashdit.shared.command import add_device, run_script

PATIENCE = timedelta(days=7)  # between the first process that is done and the last


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values."""
    parser = argparse.ArgumentParser(
        description="Encodes a folder of images (class = sub-folder) and their mirrors into latent shards.",
        epilog="A second run writes only what is missing. Example: accelerate launch encode_latents.py "
        "--images imagenet/train --vae vavae.pt --out latents",
    )
    defaults = {
        field.name: field.default for field in fields(EncodingOptions) if field.default is not MISSING
    }
    parser.set_defaults(**defaults)
    add = parser.add_argument
    add("--images", help="folder whose sub-folders are the classes")
    add(
        "--vae", help="a data set that brings one, folder or hub name of an AutoencoderKL, or LDM-layout file"
    )
    add("--out", help="folder of the shards; the same folder resumes")
    add("--verify", type=Path, metavar="OUT", help="only check the checksums of a folder of shards")
    add("--image-size", type=int, help="side of the centre crop, in pixels (default: %(default)s)")
    add("--batch-size", type=int, help="images the VAE encodes at a time (default: %(default)s)")
    add("--workers", type=int, help="reading processes of each encoding process (default: %(default)s)")
    add("--shard-rows", type=int, help="images of a shard (default: %(default)s)")
    add("--dtype", help=f"what is stored: {', '.join(DTYPES)} (default: %(default)s)")
    add("--sample", action="store_true", help="store a posterior sample, as LightningDiT does, not the mean")
    add("--seed", type=int, help="of --sample (default: %(default)s)")
    add("--precision", help=f"what the VAE computes in: {', '.join(AUTOCAST)} (default: %(default)s)")
    add_device(parser)
    return parser.parse_args(argv)


def encode(arguments: argparse.Namespace) -> None:
    """Encodes on all processes; the main one writes the manifest and says where it lies."""
    given = {field.name: getattr(arguments, field.name) for field in fields(EncodingOptions)}
    for name in ("images", "vae", "out"):
        if not given[name]:
            raise ValueError("encoding needs --images, --vae and --out; checking needs --verify")
    state = PartialState(cpu=arguments.device == "cpu", timeout=PATIENCE)
    encoding = FolderEncoding(EncodingOptions(**given), arguments.device)
    state.wait_for_everyone()
    if state.is_main_process:
        encoding.begin()
    state.wait_for_everyone()
    encoding.write(state.process_index, state.num_processes, progress=state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        manifest = encoding.finish()
        counts = (
            f"{manifest['encoded']:,} of {manifest['listed']:,} images in {len(manifest['shards'])} shards"
        )
        print(f"{counts}, {len(manifest['unreadable']):,} unreadable: {encoding.out / MANIFEST}")
    state.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, then encodes or verifies."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.verify is None:
        encode(arguments)
        return
    manifest = verify(arguments.verify)
    print(f"{len(manifest['shards'])} shards, {manifest['encoded']:,} latents and mirrors: as in {MANIFEST}")


if __name__ == "__main__":
    run_script(main)
