"""Encodes a folder of images by a VAE into latent shards, on as many processes as were launched."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from datetime import timedelta

from flashdit.commands.arguments import path, path_text
from flashdit.shared.command import CommandParser, add_device, resolve_device
from flashdit.shared.registry import counted

ENCODE_TIMEOUT = timedelta(days=7)  # between the first process that is done and the last


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line's values, checked; an option that is not given is None."""
    parser = CommandParser(
        description="Encodes a folder of images (class = sub-folder) and their mirrors into latent shards.",
        epilog="A second run writes only what is missing. Example: accelerate launch -m flashdit encode "
        "--images imagenet/train --vae vavae.pt --out latents",
    )
    add = parser.add_argument
    add("--images", type=path_text, help="folder whose sub-folders are the classes")
    add(
        "--vae",
        type=path_text,
        help="a data set that brings one, folder or hub name of an autoencoder, or LDM-layout file",
    )
    add("--out", type=path_text, help="folder of the shards; the same folder resumes")
    add("--verify", type=path, metavar="OUT", help="only check the checksums of a folder of shards")
    add("--image-size", type=int, help="side of the centre crop, in pixels (default: 256)")
    add("--background", help="what transparent pixels show: a colour's name or #rrggbb (default: white)")
    add("--batch-size", type=int, help="images the VAE encodes at a time (default: 64)")
    add("--workers", type=int, help="reading processes of each encoding process (default: 4)")
    add("--shard-rows", type=int, help="images of a shard (default: 10000)")
    add("--dtype", help="what is stored: float32, float16, bfloat16 (default: float32)")
    add("--sample", action="store_true", help="store a posterior sample, as LightningDiT does, not the mean")
    add("--seed", type=int, help="of --sample (default: 0)")
    add("--precision", help="what the VAE computes in: fp32, tf32, bf16, fp16 or auto (default: tf32)")
    add_device(parser)
    arguments = parser.parse_args(argv)
    if arguments.verify is None and not (arguments.images and arguments.vae and arguments.out):
        raise ValueError("encoding needs --images, --vae and --out; checking needs --verify")
    return arguments


def encode_on_ranks(arguments: argparse.Namespace) -> None:
    """Encodes on all processes; the main one writes the manifest and says where it lies."""
    from accelerate import PartialState

    from flashdit.data.encode_folder import EncodingOptions, FolderEncoding
    from flashdit.data.images import animated_images, transparent_images
    from flashdit.data.manifest import MANIFEST
    from flashdit.shared.locks import only_writer
    from flashdit.shared.process import check_processes

    names = (field.name for field in fields(EncodingOptions))
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    device = resolve_device(arguments.device)
    state = PartialState(cpu=device == "cpu", timeout=ENCODE_TIMEOUT)
    check_processes(state.num_processes)
    encoding = FolderEncoding(EncodingOptions(**given), device)
    with only_writer(encoding.out, called="--out") if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        if state.is_main_process:
            encoding.begin()
        state.wait_for_everyone()
        encoding.write(state.process_index, state.num_processes, progress=state.is_main_process)
        state.wait_for_everyone()
        if state.is_main_process:
            manifest = encoding.finish()
            counts = f"{manifest['encoded']:,} of {counted(manifest['listed'], 'image')}"
            shards = counted(len(manifest["shards"]), "shard")
            counts = f"{counts} in {shards}, {len(manifest['unreadable']):,} unreadable"
            transparent = transparent_images(manifest["transparent"], manifest["background"])
            animated = animated_images(manifest["animated"])
            remarks = [counts, manifest["enlarged"], transparent, animated]
            print(f"{'; '.join(remark for remark in remarks if remark)}: {encoding.out / MANIFEST}")
    state.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, then encodes or verifies."""
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.verify is None:
        encode_on_ranks(arguments)
        return
    from flashdit.data.manifest import MANIFEST, verify

    manifest = verify(arguments.verify)
    shards = counted(len(manifest["shards"]), "shard")
    print(f"{shards}, {manifest['encoded']:,} latents and mirrors: as in {MANIFEST}")
