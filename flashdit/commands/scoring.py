"""The options of an evaluation, which `eval` and `sweep` share, and the request that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flashdit.commands.arguments import add_sampling, add_weights, chosen_sampling, path, path_text
from flashdit.shared.command import add_device
from flashdit.shared.registry import announced

if TYPE_CHECKING:
    from flashdit.evaluation.request import EvaluationRequest
    from flashdit.sampling.checkpoint import CheckpointGenerator


def names(text: str) -> list[str]:
    """Returns the names of a comma-separated list."""
    return [name.strip() for name in text.split(",")]


def add_evaluation(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds everything that says what is scored how; returns the group of what is scored."""
    what = parser.add_argument_group("what is scored (default: the newest run's checkpoint)")
    what.add_argument("--checkpoint", type=path, metavar="PATH", help="a checkpoint to sample from")
    what.add_argument("--num-images", type=int, metavar="N", help="default: as many as fit the reference")
    add_weights(what)
    what.add_argument(
        "--labels",
        metavar="KIND",
        help="balanced: equal shares (default), random, or reference: the shares that the reference has; in "
        "random order",
    )
    scored = parser.add_argument_group("how it is scored")
    scored.add_argument(
        "--reference",
        type=path_text,
        metavar="NPZ|FOLDER|DATA",
        help="DATA is a data set that brings one, its name or '{name: NAME, option: value}' (default: the "
        "checkpoint's own)",
    )
    scored.add_argument(
        "--metrics",
        type=names,
        metavar="NAMES",
        help=f"comma-separated, of {','.join(sorted(announced('flashdit.metrics')))} (default: all that "
        "apply, but kid)",
    )
    add_reading(scored)
    add_sampling(parser)
    return what


def add_reading(parser: argparse._ActionsContainer) -> None:
    """Adds the options of everything that extracts features."""
    add = parser.add_argument
    add(
        "--extractor",
        metavar="NAME|RUN",
        help=f"{', '.join(sorted(announced('flashdit.extractors')))}, a run of iwin classify, timm/MODEL, a "
        "name of torch-fidelity's, or package.module:callable (default: the one that the reference's data "
        "set brings or its npz names, or inception)",
    )
    add(
        "--extractor-weights",
        "--inception-weights",
        type=path_text,
        metavar="PATH",
        help="the extractor's weights file",
    )
    add(
        "--background",
        default="white",
        metavar="COLOUR",
        help="what transparent pixels of images in folders show: a name or #rrggbb (default: white)",
    )
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="crop images of folders to N×N, as encoding does; other images must have that size (default: "
        "images as they are)",
    )
    add("--batch-size", type=int, default=100, help="images at a time; changes no number (default: 100)")
    add("--no-cache", action="store_true", help="neither read nor keep features (in $FLASHDIT_CACHE)")
    add_device(parser)


def make_request(
    arguments: argparse.Namespace, generator: CheckpointGenerator | None, samples: Path | None = None
) -> EvaluationRequest:
    """Returns the request of a command line: for a generator's samples, or for those of a path."""
    from flashdit.evaluation.request import EvaluationRequest

    return EvaluationRequest(
        samples=samples,
        generator=generator,
        sampling=None if generator is None else chosen_sampling(arguments, generator),
        data=None if generator is None else generator.data_spec,
        data_path=None if generator is None else generator.images_path,
        labels=arguments.labels or "balanced",
        num_images=arguments.num_images,
        reference=arguments.reference,
        extractor=arguments.extractor,
        extractor_weights=arguments.extractor_weights,
        metrics=arguments.metrics,
        background=arguments.background,
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        device=arguments.device,
        cache=not arguments.no_cache,
    )
