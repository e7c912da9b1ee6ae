"""Options that several commands share; declaring them imports no torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flashdit.shared.paths import check_length, expanded
from flashdit.shared.registry import announced

if TYPE_CHECKING:
    import torch

    from flashdit.sampling.checkpoint import CheckpointGenerator
    from flashdit.sampling.options import SamplingOptions

SAMPLING_ARGUMENTS = (
    *("sampler", "sampler_option", "steps", "cfg_scale", "cfg_interval", "cfg_channels", "shift", "seed"),
    *("height", "width", "precision"),
)
WEIGHTS = "ema (default), model for the raw weights, or another"


def path_text(text: str) -> str:
    """Returns the text of an option that may be a path, `~` and environment variables expanded."""
    try:
        path = expanded(text)
        check_length(path, "it")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not path:
        raise argparse.ArgumentTypeError("it must not be empty")
    return path


def path(text: str) -> Path:
    """Returns the path of an option, `~` and environment variables expanded."""
    return Path(path_text(text))


def png_path(text: str) -> Path:
    """Returns the path of an option that names a PNG file."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, got {text}")
    return path(text)


def add_weights(parser: argparse._ActionsContainer) -> None:
    """Adds what names a checkpoint's weights and its VAE."""
    add = parser.add_argument
    add("--ema", default="ema", metavar="WEIGHTS", help=WEIGHTS)
    add("--vae", type=path_text, help="folder of the VAE, where it is no longer where it was in training")


def add_guide(parser: argparse._ActionsContainer) -> None:
    """Adds what names the model that autoguidance leads away from."""
    add = parser.add_argument
    add(
        "--guide",
        type=path_text,
        metavar="RUN",
        help="autoguidance: lead away from this run or checkpoint, a smaller or less trained model of the "
        "same data, in place of the model without a class; --cfg-scale is its scale",
    )
    add("--guide-ema", metavar="WEIGHTS", help="weights of --guide: " + WEIGHTS)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling from a checkpoint; what is not given stays None."""
    group = parser.add_argument_group(
        "sampling (what is not given is as the checkpoint's configuration has it)"
    )
    add = group.add_argument
    add("--sampler", metavar="NAME", help=", ".join(sorted(announced("flashdit.samplers"))))
    add(
        "--sampler-option",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="options of the sampler (listed by: flashdit list samplers)",
    )
    for name in ("atol", "rtol"):
        text = f"the same as --sampler-option {name}=TOLERANCE"
        add(
            f"--{name}",
            nargs=1,
            action="extend",
            dest="sampler_option",
            type=f"{name}={{}}".format,
            metavar="TOLERANCE",
            help=text,
        )
    add("--steps", type=int, metavar="N", help="updates of the sampler; for an adaptive one it is refused")
    add("--cfg-scale", type=float, metavar="W", help="guidance scale; 1 is the conditional model")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="times in which guidance acts")
    add(
        "--cfg-channels",
        type=int,
        metavar="N",
        help="guide the first N channels alone, as DiT and LightningDiT do with 3 (default: all)",
    )
    add_guide(group)
    add("--shift", type=float, help="below 1, finer steps near noise; likewise")
    add("--seed", type=int)
    add(
        "--height",
        type=int,
        help="in pixels; any multiple of the patch size, for latents times the VAE's factor",
    )
    add("--width", type=int, help="in pixels; likewise")
    add("--precision", help="what the model computes in: fp32, tf32, bf16, fp16 or auto")
    add(
        "--compile",
        action="store_true",
        default=None,
        help="compile the model, on a GPU into CUDA graphs: slow to start, then faster",
    )


def chosen_sampling(arguments: argparse.Namespace, generator: CheckpointGenerator) -> SamplingOptions:
    """Returns the checkpoint's sampling options with those that the command line gives.

    Raises:
        ValueError: If an option is invalid, or steps are given to a sampler that chooses its own.
    """
    from flashdit.sampling.checkpoint import sampling_options

    names = (*SAMPLING_ARGUMENTS, "batch_size")
    options = sampling_options(generator, {name: getattr(arguments, name) for name in names})
    if generator.guide is not None and options.cfg_scale == 1:
        raise ValueError("--guide requires a --cfg-scale other than 1, at which no guidance acts, got 1")
    for name in ("steps", "shift") if options.is_adaptive else ():
        value = getattr(arguments, name)
        if value is not None:
            raise ValueError(
                f"--{name} is for samplers that do not choose their steps, as {options.sampler_name} does, "
                f"got {value}"
            )
    return options


def guide_of(arguments: argparse.Namespace) -> tuple[str | None, str]:
    """Returns the run or checkpoint of `--guide`, None where there is none, and the name of its weights.

    Raises:
        ValueError: If weights are named, but no run.
    """
    if arguments.guide is None and arguments.guide_ema is not None:
        raise ValueError(f"--guide-ema requires --guide, got {arguments.guide_ema} alone")
    return arguments.guide, arguments.guide_ema or "ema"


def open_generator(
    arguments: argparse.Namespace, device: torch.device | str | None = None
) -> CheckpointGenerator:
    """Returns the generator of `--checkpoint` on a device or `--device`, compiled if that was asked for."""
    from flashdit.sampling.checkpoint import load_generator
    from flashdit.shared.process import keep_freed_memory

    where = arguments.device if device is None else device
    if str(where).startswith("cpu"):
        keep_freed_memory()
    compiled = bool(arguments.compile)
    given = (arguments.checkpoint, where, arguments.vae, arguments.ema)
    generator = load_generator(*given, compiled=compiled)
    guide, weights = guide_of(arguments)
    if guide is not None:
        opened = load_generator(guide, where, arguments.vae, weights, compiled=compiled, called="--guide")
        generator.guide_by(opened)
    return generator
