"""Digits trained on 16×16 latents, sampled at other sizes without retraining.

`python -m benchmarks.any_size iwin=runs/digits global=RUN`: each checkpoint draws digits at each size. How
many of them a classifier takes for what they were meant as is reported of the whole image, resized to 32×32,
of the central 32×32 crop, and of the crop in which it is surest. How far inward the border acts is shown by
how much the velocity changes where the depthwise convolution's padding is no longer zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from benchmarks.side_by_side import machine, results_path, save
from flashdit.digits.classifier import load_digits_classifier
from flashdit.sampling.checkpoint import CheckpointGenerator, load_generator
from flashdit.sampling.classes import balanced_labels
from flashdit.shared.files import write_atomically
from flashdit.shared.pictures import labelled_grid, rows_by_class
from iwin_core.attention import IwinAttention

SIZES = ((16, 16), (24, 24), (16, 32))  # latents
CROP = 32  # pixels of a training image
CROP_STRIDE = 4
PER_CLASS = 6
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@contextmanager
def windows(model: torch.nn.Module, size: tuple[int, int], base: tuple[int, int]) -> Iterator[None]:
    """Scales every window within as the latents are: from `base`, where it was trained, to `size`."""
    found = [module for module in model.modules() if isinstance(module, IwinAttention)]
    kept = [module.window for module in found]
    for module in found:
        module.window = tuple(m * new // old for m, new, old in zip(module.window, size, base, strict=True))
    yield
    for module, window in zip(found, kept, strict=True):
        module.window = window


@contextmanager
def replicated_padding(model: torch.nn.Module) -> Iterator[None]:
    """Pads every depthwise convolution with copies of the border instead of zeros within."""
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    for convolution in convolutions:
        convolution.padding_mode = "replicate"
    yield
    for convolution in convolutions:
        convolution.padding_mode = "zeros"


@torch.no_grad()
def accuracies(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns the share of images (n, 3, h, w) taken for their class: whole, at the centre, in the best crop.

    The best crop is the one, of all every 4 pixels, where the classifier is surest of any class: it does not
    know which class was meant.
    """
    classifier = load_digits_classifier()

    def right(logits: Tensor) -> float:
        return (logits.argmax(-1) == labels).float().mean().item()

    crops = images.unfold(2, CROP, CROP_STRIDE).unfold(3, CROP, CROP_STRIDE)  # (n, 3, rows, columns, 32, 32)
    rows, columns = crops.shape[2:4]
    flat = rearrange(crops, "n c rows columns h w -> (n rows columns) c h w").contiguous()
    logits = torch.cat([classifier(part)["logits"] for part in flat.split(512)])
    logits = rearrange(logits, "(n places) k -> n places k", n=len(images))
    surest = logits.softmax(-1).amax(-1).argmax(1)
    centre = (rows // 2) * columns + columns // 2
    chosen = logits[torch.arange(len(images)), surest]
    return {
        "whole": right(classifier(images)["logits"]),
        "centre": right(logits[:, centre]),
        "best": right(chosen),
    }


@torch.no_grad()
def felt_border(generator: CheckpointGenerator, size: tuple[int, int]) -> list[float]:
    """Returns the relative change of the velocity at each distance from the border, in tokens."""
    labels = torch.arange(10).repeat(2)
    noise = torch.randn(len(labels), generator.shape[0], *size, generator=torch.Generator().manual_seed(0))
    change = torch.zeros(size)
    scale = 0.0
    for t in TIMES:
        plain = generator.model(noise, torch.full((len(labels),), t), labels)
        with replicated_padding(generator.model):
            other = generator.model(noise, torch.full((len(labels),), t), labels)
        change += (plain - other).square().mean((0, 1))
        scale += plain.square().mean().item()
    p = generator.model.patch_size
    tokens = F.avg_pool2d(change[None], p)[0] / scale
    height, width = tokens.shape
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    distance = torch.minimum(
        torch.minimum(rows, height - 1 - rows), torch.minimum(columns, width - 1 - columns)
    )
    return [tokens[distance == d].mean().sqrt().item() for d in range(int(distance.max()) + 1)]


def study(name: str, generator: CheckpointGenerator, count: int, cfg_scale: float) -> list[dict[str, Any]]:
    """Returns a record for each size, with the window kept and scaled where there is one; saves pictures."""
    factor = CROP // generator.shape[1]
    base = (generator.shape[1], generator.shape[2])
    has_windows = any(isinstance(module, IwinAttention) for module in generator.model.modules())
    records = []
    for size in SIZES:
        options = replace(
            generator.sampling, cfg_scale=cfg_scale, height=size[0] * factor, width=size[1] * factor
        )
        labels = balanced_labels(count, generator.num_classes, options.seed)
        for mode in ("kept", "scaled") if has_windows and size != base else ("kept",):
            with windows(generator.model, size if mode == "scaled" else base, base):
                images = torch.cat([batch.images for batch in generator.generate(labels, options)])
                felt = felt_border(generator, size) if has_windows else None
            found = accuracies(images, labels)
            window = mode if has_windows and size != base else ""
            records.append(
                {"model": name, "latents": f"{size[0]}×{size[1]}", "window": window, **found, "felt": felt}
            )
            if mode == "kept":
                draw(f"{name}_{size[0]}x{size[1]}", images, labels, generator.class_names)
    return records


def draw(name: str, images: Tensor, labels: Tensor, class_names: list[str]) -> None:
    """Saves a grid of the first images of each class."""
    first = torch.cat([(labels == label).nonzero()[:PER_CLASS, 0] for label in labels.unique()])
    grid = labelled_grid(rows_by_class(images[first], labels[first], class_names, PER_CLASS), name)
    path = results_path(f"any_size_{name}.png")
    write_atomically(path, lambda temporary: grid.save(temporary, format="png"))


def to_markdown(records: list[dict[str, Any]]) -> str:
    """Returns the tables."""
    lines = [
        "| model | latents | window | whole image | centre crop | surest crop |",
        "|---|---|---|---:|---:|---:|",
    ]
    for record in records:
        shares = " | ".join(f"{record[key]:.1%}" for key in ("whole", "centre", "best"))
        lines.append(f"| {record['model']} | {record['latents']} | {record['window']} | {shares} |")
    lines += ["", "Change of the velocity, in shares of its size, by distance from the border in tokens:", ""]
    for record in records:
        if record["felt"]:
            felt = "  ".join(f"{value:.3f}" for value in record["felt"])
            lines.append(f"- {record['model']} {record['latents']} {record['window']}: {felt}")
    return "\n".join([*lines, ""])


def main() -> None:
    """Studies each checkpoint and writes the tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=RUN", help="such as iwin=runs/digits")
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--cfg-scale", type=float, default=1.5)
    arguments = parser.parse_args()
    records = []
    for pair in arguments.checkpoints:
        name, _, run = pair.partition("=")
        records += study(name, load_generator(run), arguments.num_images, arguments.cfg_scale)
    content = {"machine": machine(), "num_images": arguments.num_images, "cfg_scale": arguments.cfg_scale}
    save("any_size", content | {"records": records}, to_markdown(records))


if __name__ == "__main__":
    main()
