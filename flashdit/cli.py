"""What the scripts share: sampling options, and a user's mistake as one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf.errors import OmegaConfBaseException

from flashdit.flow.samplers import ADAPTIVE, SAMPLERS
from flashdit.generate import CheckpointGenerator, SamplingOptions, load_generator
from flashdit.training.options import DTYPES

SAMPLING = (
    *("sampler", "steps", "cfg_scale", "cfg_interval", "shift", "seed"),
    *("height", "width", "dtype", "atol", "rtol"),
)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; what a user can cause ends it with one sentence instead of a traceback.

    `FLASHDIT_TRACEBACK=1` shows the traceback, for those who look for a bug of ours.
    """
    try:
        main()
    except (ValueError, OSError, OmegaConfBaseException) as error:
        if os.environ.get("FLASHDIT_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        sys.exit(2)


def check_device(name: str) -> str:
    """Returns the name of a device that this machine has.

    Raises:
        OSError: If it has none of that name; argparse would put its usage before a ValueError.
    """
    try:
        device = torch.device(name)
        count = 1 if device.type == "cpu" else torch.get_device_module(device).device_count()
    except (RuntimeError, AttributeError):  # torch knows no such kind, or it computes nothing
        count = 0
    if not count or (device.index or 0) >= count:
        raise OSError(f"--device must be one of this machine, such as cpu, got {name}")
    return name


def add_device(parser: argparse._ActionsContainer) -> None:
    """Adds `--device`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=check_device, default=device, help=f"where to run (default here: {device})"
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling from a checkpoint; what is not given stays None."""
    group = parser.add_argument_group(
        "sampling (what is not given is as the checkpoint's configuration has it)"
    )
    add = group.add_argument
    add("--sampler", metavar="NAME", help=" or ".join(SAMPLERS))
    add("--steps", type=int, metavar="N", help=f"updates of the sampler; {' and '.join(ADAPTIVE)} takes none")
    add("--cfg-scale", type=float, metavar="W", help="guidance scale; 1 is the conditional model")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times in which guidance acts")
    add("--shift", type=float, help="below 1, finer steps near noise")
    add("--seed", type=int)
    add("--height", type=int, help="in pixels; any multiple of the VAE's factor times the patch size")
    add("--width", type=int, help="in pixels; likewise")
    add("--dtype", help=f"of the model's matrix products: {' or '.join(DTYPES)}")
    add("--atol", type=float, help="absolute tolerance of an adaptive sampler")
    add("--rtol", type=float, help="relative tolerance of an adaptive sampler")
    add("--vae", help="folder of the VAE, where it is no longer where it was in training")
    add(
        "--compile",
        action="store_true",
        default=None,
        help="compile the model, on a GPU into CUDA graphs: slow to start, then faster",
    )


def open_generator(
    arguments: argparse.Namespace, device: torch.device | str | None = None
) -> CheckpointGenerator:
    """Returns the generator of `--checkpoint`, on a device or `--device`, compiled if that was asked for."""
    where = arguments.device if device is None else device
    generator = load_generator(arguments.checkpoint, where, arguments.vae, arguments.ema)
    if arguments.compile:
        generator.compile()
    return generator


def sampling_options(arguments: argparse.Namespace, generator: CheckpointGenerator) -> SamplingOptions:
    """Returns the checkpoint's sampling options with what the command line says otherwise, checked."""
    given: dict[str, Any] = {name: getattr(arguments, name) for name in (*SAMPLING, "batch_size")}
    options = replace(generator.sampling, **{k: v for k, v in given.items() if v is not None})
    options.check()
    generator.space.need_vae()
    if options.height or options.width:
        generator.latent_shape(options)
    return options
