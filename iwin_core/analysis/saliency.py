"""Which pixels does a model use? Effective receptive fields and Grad-CAM, for feature maps of any layout."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor, nn

LAYOUTS = {"nchw": "b c h w -> b h w c", "nhwc": "b h w c -> b h w c"}
MAX_PREFIX = 8  # class and register tokens before those of the map


def find_module(model: nn.Module, layer: str) -> nn.Module:
    """Returns the module of that dotted name.

    Raises:
        ValueError: If there is none; names the nearest.
    """
    modules = dict(model.named_modules())
    if layer in modules:
        return modules[layer]
    near = difflib.get_close_matches(layer, modules, n=4, cutoff=0.3)
    nearest = (
        f"nearest are {', '.join(near)}" if near else f"it has {', '.join(dict(model.named_children()))}"
    )
    raise ValueError(f"layer must be a module of the model, {nearest}, got {layer=}")


def misfit(grid: Sequence[int], image_size: Sequence[int]) -> float:
    """Returns by how many cells a grid's sides are not to each other as the image's; infinity beyond one."""
    (h, w), (height, width) = grid, image_size
    cells = abs(h * width - w * height) / max(height, width)
    return cells if h <= height and w <= width and cells <= 1 else math.inf


def token_grid(num_tokens: int, image_size: Sequence[int]) -> tuple[int, int] | None:
    """Returns (h, w) of a map that is stored as a row of tokens, class tokens first; None if none fits."""
    best, grid = math.inf, None
    for n in range(num_tokens, max(0, num_tokens - MAX_PREFIX - 1), -1):
        h = max(1, round((n * image_size[0] / image_size[1]) ** 0.5))
        if n % h == 0 and misfit((h, n // h), image_size) < best:
            best, grid = misfit((h, n // h), image_size), (h, n // h)
    return grid


def as_map(feature: Tensor, image_size: Sequence[int], layout: str | None = None) -> Tensor:
    """Returns a layer's output as a map (B, h, w, C).

    Args:
        feature: (B, C, h, w), (B, h, w, C) or tokens (B, n, C), class tokens first, which are left out.
        image_size: H and W of the model's input.
        layout: "nchw" or "nhwc"; None takes the one whose h : w is nearer to the image's.

    Raises:
        ValueError: If the output is no map, or could be either layout.
    """
    shape = tuple(feature.shape)
    if feature.ndim == 3 and (grid := token_grid(shape[1], image_size)):
        h, w = grid
        return rearrange(feature[:, shape[1] - h * w :], "b (h w) c -> b h w c", h=h)
    if feature.ndim != 4:
        raise ValueError(
            f"layer must put out a map or the tokens of one, got {shape} for {tuple(image_size)}"
        )
    if layout is None:
        misfits = {"nchw": misfit(shape[2:], image_size), "nhwc": misfit(shape[1:3], image_size)}
        layout = min(misfits, key=misfits.__getitem__)
        if misfits["nchw"] == misfits["nhwc"]:
            raise ValueError(
                f"layout must be given where the shape leaves it open: {' or '.join(LAYOUTS)}, got {shape}"
            )
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout=}")
    return rearrange(feature, LAYOUTS[layout])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model in evaluation mode; afterwards each module is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_with_feature(model: nn.Module, layer: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what a layer puts out and what the model puts out, with the graph between them and the images.

    Args:
        model: Any module.
        layer: Dotted name of one of its modules.
        images: (B, 3, H, W).

    Raises:
        ValueError: If there is no such layer, or it puts out no tensor.
    """
    found: list = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        found.append(output)
        return output.clone() if isinstance(output, Tensor) else output  # what follows may work in place

    handle = find_module(model, layer).register_forward_hook(keep)
    try:
        with evaluating(model):
            output = model(images)
    finally:
        handle.remove()
    if not found or not isinstance(found[-1], Tensor):
        came = type(found[-1]).__name__ if found else "nothing"
        raise ValueError(f"layer must put out a tensor when the model runs, got {came} from {layer=}")
    return found[-1], output


@torch.enable_grad()
def effective_receptive_field(
    model: nn.Module,
    layer: str,
    images: Tensor,
    position: Sequence[int] | None = None,
    layout: str | None = None,
) -> Tensor:
    """Returns how much each pixel moves one place of a feature map: mean |gradient| of images and channels.

    Args:
        model: Any module.
        layer: Dotted name of the module whose output is the feature map.
        images: (B, C, H, W).
        position: Row and column on the feature map; None is its centre.
        layout: As in `as_map`.

    Returns:
        (H, W), not normalised.

    Raises:
        ValueError: If the layer is unknown or no map, or the position lies outside.

    Source: Luo et al. 2016 (arXiv 1701.04128), section 3.
    """
    images = images.detach().clone().requires_grad_()
    feature = as_map(run_with_feature(model, layer, images)[0], images.shape[-2:], layout)
    grid = tuple(feature.shape[1:3])
    i, j = (grid[0] // 2, grid[1] // 2) if position is None else position
    if not (0 <= i < grid[0] and 0 <= j < grid[1]):
        raise ValueError(f"position must lie on the feature map, got position={(i, j)} for {grid}")
    # Differs from Luo et al.: random signs, not ones, since the channels of a LayerNorm add up to a constant.
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (feature.shape[0], feature.shape[3]), generator=generator) * 2 - 1
    (gradient,) = torch.autograd.grad((feature[:, i, j] * signs.to(feature)).sum(), images)
    return gradient.abs().mean((0, 1))


def share_of_pixels(field: Tensor, mass: float) -> float:
    """Returns the smallest share of pixels that together hold a share `mass` of the field (H, W)."""
    largest = field.flatten().double().sort(descending=True).values
    needed = (largest.cumsum(0) < mass * largest.sum()).sum().item() + 1
    return needed / largest.numel()


@torch.enable_grad()
def grad_cam(
    model: nn.Module, layer: str, image: Tensor, class_index: int | None = None, layout: str | None = None
) -> Tensor:
    """Returns where a layer speaks for a class: ReLU(Σ_c α_c A_c), α_c the mean of ∂score/∂A_c over the map.

    Args:
        model: Any module that puts out logits (B, classes).
        layer: Dotted name of the module whose output is the feature map A.
        image: (C, H, W).
        class_index: Whose score; None takes the highest.
        layout: As in `as_map`.

    Returns:
        (h, w) of the feature map, not normalised.

    Raises:
        ValueError: If the layer, the model's output or the class is invalid.

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), eqs (1) and (2).
    """
    image = image.detach().clone().requires_grad_()
    feature, logits = run_with_feature(model, layer, image[None])
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must put out logits (B, classes) for Grad-CAM, got {came}")
    index = int(logits[0].argmax()) if class_index is None else class_index
    if not 0 <= index < logits.shape[1]:
        raise ValueError(
            f"class_index must be below the number of classes {logits.shape[1]}, got {class_index=}"
        )
    (gradient,) = torch.autograd.grad(logits[0, index], feature)
    size = image.shape[-2:]
    weights = as_map(gradient, size, layout).mean((1, 2))  # (1, c)
    return torch.einsum("bhwc,bc->hw", as_map(feature, size, layout), weights).relu().detach()
