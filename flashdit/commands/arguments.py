"""What the scripts share: sampling options, and a user's mistake as one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.features import Extractor
from flashdit.evaluation.images.sources import GeneratedSource
from flashdit.evaluation.metrics.scoring import check_accuracy, default_metrics
from flashdit.flow.samplers import ADAPTIVE, SAMPLERS
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator, sampling_options
from flashdit.sampling.classes import balanced_labels, random_labels
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


def check_batch_size(arguments: argparse.Namespace) -> None:
    """Refuses an empty batch."""
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be positive, got {arguments.batch_size}")


def reference_name(arguments: argparse.Namespace, generator: CheckpointGenerator | None) -> str:
    """Returns the reference that was asked for, or the digits for a model of digits."""
    is_digits = generator is not None and generator.data_name == "digits"
    name = arguments.reference or ("digits" if is_digits else None)
    if name is None:
        raise ValueError("this needs a --reference: an ADM npz, a folder of images, or 'digits'")
    return name


def open_extractor(arguments: argparse.Namespace, reference: str) -> Extractor:
    """Returns the extractor that was asked for, or the reference's own, on the device."""
    name = arguments.extractor or ("digits" if reference == "digits" else "inception")
    return build_extractor(name, arguments.extractor_weights).to(arguments.device)


def chosen_metrics(
    arguments: argparse.Namespace, extractor: Extractor, classes: Sequence[str] | None
) -> list[str]:
    """Returns the metrics that were asked for, or all that apply, and refuses accuracy where it does not."""
    metrics = arguments.metrics or default_metrics(extractor, classes)
    check_accuracy(metrics, extractor, classes)
    return metrics


def generated_source(
    arguments: argparse.Namespace, generator: CheckpointGenerator, reference: str
) -> GeneratedSource:
    """Returns the source that samples from a generator, its options checked."""
    options = options_from(arguments, generator)
    default_count = 1000 if reference == "digits" else 50_000
    count = default_count if arguments.num_images is None else arguments.num_images
    if count < 1:
        raise ValueError(f"--num-images must be positive, got {count}")
    if arguments.labels == "random":
        labels = random_labels(count, range(max(1, generator.num_classes)), options.seed)
    else:
        labels = balanced_labels(count, generator.num_classes, options.seed)
    return GeneratedSource(generator, labels, options)
