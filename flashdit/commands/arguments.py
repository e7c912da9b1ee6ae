"""What the scripts share: sampling options, and a user's mistake as one line on stderr and exit status 2."""

from __future__ import annotations

import argparse

import torch

from flashdit.flow.samplers import ADAPTIVE, SAMPLERS
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator, sampling_options
from flashdit.sampling.options import SamplingOptions
from flashdit.training.options import DTYPES

SAMPLING = (
    *("sampler", "steps", "cfg_scale", "cfg_interval", "shift", "seed"),
    *("height", "width", "dtype", "atol", "rtol"),
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


def options_from(arguments: argparse.Namespace, generator: CheckpointGenerator) -> SamplingOptions:
    """Returns the checkpoint's sampling options with what the command line says otherwise, checked."""
    return sampling_options(generator, {name: getattr(arguments, name) for name in (*SAMPLING, "batch_size")})
