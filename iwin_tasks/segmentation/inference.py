"""Class probabilities of images: whole or in sliding windows, at several scales, mirrored too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flashdit.shared.registry import check_finite
from iwin_core.windows import Window, per_axis
from iwin_tasks.segmentation.heads import resized

Logits = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class InferenceOptions:
    """Options of how a model is tested; the defaults see each image whole, once."""

    window: list[int] | None = None
    """Height and width in pixels of what is seen at once; None means the whole image."""
    stride: list[int] | None = None
    """Steps down and to the right from one window to the next; None means two thirds of the window."""
    scales: list[float] = field(default_factory=lambda: [1.0])
    """Factors of the image's size, over which probabilities are averaged."""
    flip: bool = False
    """Whether each is also seen mirrored left to right."""

    def __post_init__(self):
        check_finite(self, "inference.")
        check_scales(self.scales)
        window_and_step(self.window, self.stride)


@torch.inference_mode()
def predict_probabilities(
    model: Logits,
    images: Tensor,
    *,
    window: Window | None = None,
    stride: Window | None = None,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    size: Sequence[int] | None = None,
) -> Tensor:
    """Returns the probabilities (B, K, *size) float32, the mean over scales and mirror images.

    Args:
        model: Images (B, 3, H, W) → logits (B, K, H, W), in evaluation mode.
        images: Normalised (B, 3, H, W).
        window: Sides in pixels of what is seen at once; None means the whole image.
        stride: Step from one window to the next, at most `window`; None means two thirds of it.
        scales: By which the images are resized, bilinear, before the model sees them.
        flip: Whether each is also seen mirrored left to right.
        size: Height and width of the result, as the labels have them; None means those of the images.

    Raises:
        ValueError: If window, stride or scales are invalid.

    Source: mmsegmentation's whole and slide inference and its test-time augmentation.
    """
    check_scales(scales)
    slid = window_and_step(window, stride)
    see = model if slid is None else partial(slide, model, window=slid[0], stride=slid[1])
    height, width = images.shape[-2:]
    size = (height, width) if size is None else size
    total, seen = None, 0
    for scale in scales:
        scaled = resized(images, [max(1, int(side * scale + 0.5)) for side in (height, width)])
        for mirrored in (False, True) if flip else (False,):
            logits = see(scaled.flip(-1) if mirrored else scaled)
            shares = resized(logits.float(), size).softmax(1)
            shares = shares.flip(-1) if mirrored else shares
            total = shares if total is None else total + shares
            seen += 1
    assert total is not None
    return total / seen


def check_scales(scales: Sequence[float]) -> None:
    """Raises ValueError unless there is a scale and all are positive."""
    if not scales or not all(scale > 0 for scale in scales):
        raise ValueError(f"scales must be positive numbers, at least one, got {list(scales)}")


def window_and_step(
    window: Window | None, stride: Window | None
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns a window's height and width and how far it moves down and to the right; None without one."""
    if window is None:
        if stride is not None:
            raise ValueError(f"stride needs a window, got {stride} without")
        return None
    sides = per_axis(window, 2, "window")
    default = [max(1, 2 * side // 3) for side in sides]
    steps = per_axis(default if stride is None else stride, 2, "stride")
    if any(step > side for step, side in zip(steps, sides, strict=True)):
        raise ValueError(f"stride must be at most the window, got {stride} for {window}")
    return sides, steps


def starts(side: int, window: int, stride: int) -> list[int]:
    """Returns where windows begin along a side; the last one ends at its end."""
    count = max(side - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride + window, side) - window, 0) for number in range(count)]


def slide(model: Logits, images: Tensor, window: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Returns the logits (B, K, H, W), where windows overlap their mean.

    Args:
        model: Images → logits of their sides.
        images: (B, 3, H, W); a side smaller than the window is seen whole.
        window: Height and width of a window.
        stride: Steps down and to the right.
    """
    rows, columns = (starts(*given) for given in zip(images.shape[-2:], window, stride, strict=True))
    total, seen = None, images.new_zeros(images.shape[-2:])
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(images[place]).float()
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
            total[place] += logits
            seen[place] += 1
    assert total is not None
    return total / seen
