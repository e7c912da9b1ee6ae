"""What eval_fid.py and its sweep open from the command line: an extractor, a reference's name, samples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flashdit.classes import balanced_labels, random_labels
from flashdit.cli import sampling_options
from flashdit.evaluation.extractors import build_extractor
from flashdit.evaluation.features import Extractor
from flashdit.evaluation.scoring import check_accuracy, default_metrics
from flashdit.evaluation.sources import GeneratedSource
from flashdit.generate import CheckpointGenerator


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
    options = sampling_options(arguments, generator)
    default_count = 1000 if reference == "digits" else 50_000
    count = default_count if arguments.num_images is None else arguments.num_images
    if count < 1:
        raise ValueError(f"--num-images must be positive, got {count}")
    if arguments.labels == "random":
        labels = random_labels(count, range(max(1, generator.num_classes)), options.seed)
    else:
        labels = balanced_labels(count, generator.num_classes, options.seed)
    return GeneratedSource(generator, labels, options)
