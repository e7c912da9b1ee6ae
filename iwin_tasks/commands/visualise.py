"""Which pixels does a model use? Effective receptive fields and Grad-CAM (paper Fig. 4) of any timm model.

`iwin visualise --model iwin_tiny_patch4_window7_224 --layer layers.0 layers.2 --kind erf`
`iwin visualise --checkpoint runs/iwin_digits_32 --layer layers.1 --kind gradcam --images DIR`
"""

from __future__ import annotations

import argparse
import difflib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashdit.commands.arguments import path, png_path
from flashdit.shared.command import CommandParser
from flashdit.shared.files import DRAWN
from flashdit.shared.locks import only_writer
from flashdit.shared.paths import check_outside

if TYPE_CHECKING:
    from torch import Tensor, nn


def build_model(name: str | None, checkpoint: Path | None, size: Sequence[int] | None) -> nn.Module:
    """Returns a timm model in evaluation mode, on the CPU.

    Args:
        name: Of timm, or of Iwin, whose names register on import; None where the checkpoint is a run.
        checkpoint: A file of weights, or a run of `iwin classify`, whose average is meant; None leaves the
            weights as initialised under seed 0.
        size: H and W to set the model to, where it has a fixed size; None keeps its own.

    Raises:
        ValueError: If the name is unknown, the checkpoint is of another model or the size is invalid.
    """
    import timm
    import torch

    import iwin_core  # noqa: F401 - registers its models with timm

    if checkpoint and checkpoint.is_dir():
        return trained_model(name, checkpoint, size)
    if name is None:
        raise ValueError("a picture requires --model NAME, or --checkpoint with a run of iwin classify")
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.3))
        raise ValueError(f"model must be a name that timm knows, nearest are {near}, got {name!r}")
    if checkpoint and not checkpoint.is_file():
        raise ValueError(f"checkpoint must be a file of weights or a run, got {checkpoint}")
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, checkpoint_path=str(checkpoint or ""))
    except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
        first_lines = " ".join(str(error).split())[:200]
        raise ValueError(
            f"checkpoint must hold the weights of {name}, got {checkpoint}: {first_lines}"
        ) from error
    if size and hasattr(model, "set_input_size"):
        set_size(model, name, size)
    return model.eval()


def trained_model(name: str | None, run: Path, size: Sequence[int] | None) -> nn.Module:
    """Returns the averaged model of a run of `iwin classify`, in evaluation mode."""
    from iwin_tasks.classification.model import load_weights, make_model, read_spec

    spec = read_spec(run)
    if name is not None and name != spec["name"]:
        raise ValueError(f"--model must be that of the run, {spec['name']}, or be left out, got {name}")
    model = make_model(spec)
    load_weights(model, run)
    if size:
        set_size(model, spec["name"], size)
    return model.eval()


def model_size(model: Any) -> tuple[int, int]:
    """Returns (H, W) of the images that a model was made for, in pixels."""
    if hasattr(model, "config"):
        from iwin_core.windows import per_axis

        height, width = per_axis(model.config.img_size, 2, "img_size")
        return height, width
    return model.pretrained_cfg["input_size"][1:]


def set_size(model: Any, name: str, size: Sequence[int]) -> None:
    """Sets the image size of a timm model that has a fixed one."""
    try:
        model.set_input_size(img_size=tuple(size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"size must be one that {name} takes, got {tuple(size)}: {error}") from error


def load_images(folder: Path | None, size: tuple[int, int], at_most: int) -> Tensor:
    """Returns float (N, 3, H, W) in [0, 1]: the folder's first images, or noise if it is None."""
    if min(size) < 1 or at_most < 1:
        raise ValueError(f"size and num_images must be positive, got {size=}, num_images={at_most}")
    import torch

    if folder is None:
        return torch.rand(at_most, 3, *size, generator=torch.Generator().manual_seed(0))
    from iwin_tasks.commands.panels import read_photographs

    return read_photographs(folder, size, at_most)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line; the word none stands for None."""

    def path_or_none(text: str) -> Path | None:
        return None if text == "none" else path(text)

    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", help="timm name; Iwin's are registered too (a run knows its own)")
    parser.add_argument(
        "--checkpoint",
        type=path_or_none,
        metavar="PATH|none",
        help="weights, or a run of iwin classify (default: none, as initialised)",
    )
    parser.add_argument("--images", type=path_or_none, metavar="FOLDER|none", help="default: none, noise")
    parser.add_argument("--num-images", type=int, default=4, help="images used at most (default: 4)")
    parser.add_argument("--layer", nargs="+", required=True, metavar="NAME", help="dotted module names")
    parser.add_argument("--kind", choices=("erf", "gradcam"), default="erf", help="default: erf")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="default: the model's")
    parser.add_argument(
        "--position",
        type=int,
        nargs=2,
        metavar=("ROW", "COLUMN"),
        help="of the feature map (default: centre)",
    )
    parser.add_argument("--class-index", type=int, help="for gradcam (default: the highest score)")
    parser.add_argument("--layout", help="of the feature map: nchw or nhwc, where its shape leaves it open")
    parser.add_argument("--output", type=png_path, default=Path("visualise.png"), metavar="PNG")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Draws the picture; prints how concentrated each receptive field is."""
    arguments = parse(argv)
    for option, kind in (("class_index", "gradcam"), ("position", "erf")):
        if getattr(arguments, option) is not None and arguments.kind != kind:
            name = f"--{option.replace('_', '-')}"
            raise ValueError(f"{name} is for --kind {kind}, got it with --kind {arguments.kind}")
    check_outside(arguments.output, arguments.images, "--output", "--images")
    with only_writer(arguments.output, is_file=True, mark=DRAWN):
        visualise(arguments)
    print(f"wrote {arguments.output}")


def visualise(arguments: argparse.Namespace) -> None:
    """Draws the picture and writes it."""
    import torch

    from iwin_core.analysis.saliency import effective_receptive_field, grad_cam, share_of_pixels
    from iwin_tasks.commands.drawing import draw_cams, draw_fields, save_drawing

    model = build_model(arguments.model, arguments.checkpoint, arguments.size)
    name = arguments.model or arguments.checkpoint.name
    about = vars(model)["pretrained_cfg"]
    height, width = arguments.size or model_size(model)
    size = (height, width)
    images = load_images(arguments.images, size, arguments.num_images)
    mean, std = (torch.tensor(about[name]).reshape(3, 1, 1) for name in ("mean", "std"))
    normalised = (images - mean) / std
    options = {"layout": arguments.layout}
    if arguments.kind == "erf":
        options["position"] = arguments.position
        fields = [
            (name, effective_receptive_field(model, name, normalised, **options)) for name in arguments.layer
        ]
        for name, field in fields:
            shares = ", ".join(
                f"{mass:.0%} in {share_of_pixels(field, mass):.2%}" for mass in (0.5, 0.95, 0.99)
            )
            print(f"{name}: of the gradient {shares} of the pixels")
        picture = draw_fields(
            f"Gradient of one position of {name} by pixel (effective receptive field)", fields
        )
    else:
        options["class_index"] = arguments.class_index
        cams = [[grad_cam(model, name, image, **options) for name in arguments.layer] for image in normalised]
        picture = draw_cams(f"Grad-CAM of {name}", arguments.layer, images, cams)
    save_drawing(picture, arguments.output)
