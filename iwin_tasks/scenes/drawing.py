"""One scene: digits of various sizes on a piece of a photograph, with boxes, masks and a label map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.glyphs.drawing import DARK, LIGHT, PHOTOGRAPHS, photograph
from flashdit.shared.registry import unknown
from flashdit.shared.seeds import check_seed, generator_for

LABEL_NAMES = ("background", *DIGIT_NAMES)
"""Of the values of a label map."""
REGIONS = {"train": (0.0, 0.65), "held-out": (0.65, 1.0)}
"""The part of each photograph's width that a split's grounds are cut from."""
DIGIT_SIDE = 8  # of scikit-learn's digits, in pixels
FRAME = 1  # pixels of nothing around them, so that strokes at their border end softly
SIZE_BOUNDS = (DIGIT_SIDE, 512)
MOST_DIGITS = 64
LONGEST_SIDE = 4096
LARGEST_ZOOM = 2.5
"""How many times at most a ground is smaller than the largest piece of its form."""
TRIES = 8
"""Places that are tried for a digit before it is left out."""
LEAST_VISIBLE = 0.7
"""Of its mask, how much must be seen of every digit in the scene."""
MIDDLE = 127.5


@dataclass(kw_only=True)
class SceneOptions:
    """Options of the scenes."""

    seed: int = 0
    """Of everything drawn: one seed, split and index is one scene."""
    image_size: tuple[int, int] = (96, 96)
    """Height and width in pixels."""
    digits: tuple[int, int] = (1, 9)
    """Least and most digits that are placed; one that fits nowhere is left out."""
    digit_size: tuple[int, int] = (18, 36)
    """Least and largest side of a digit's square in pixels, of which it fills up to four fifths."""
    train_images: int = 20_000
    """Scenes of an epoch."""
    held_out_images: int = 200

    def __post_init__(self):
        check_seed(self.seed, "data.seed")
        (least, most), (small, large) = self.digits, self.digit_size
        if not 0 <= least <= most <= MOST_DIGITS:
            raise ValueError(f"data.digits must be 0 ≤ least ≤ most ≤ {MOST_DIGITS}, got {least} and {most}")
        if max(self.image_size) > LONGEST_SIDE:
            raise ValueError(f"data.image_size must be at most {LONGEST_SIDE}, got {list(self.image_size)}")
        if not SIZE_BOUNDS[0] <= small <= large <= min(SIZE_BOUNDS[1], *self.image_size):
            raise ValueError(
                f"data.digit_size must be {SIZE_BOUNDS[0]} ≤ least ≤ largest ≤ {SIZE_BOUNDS[1]} and fit the "
                f"image, got {small} and {large} for {list(self.image_size)}"
            )
        if min(self.train_images, self.held_out_images) < 1:
            raise ValueError(
                "data.train_images and data.held_out_images must be at least 1, got "
                f"{self.train_images} and {self.held_out_images}"
            )


class Scene(NamedTuple):
    """One image and what is to be found in it; n may be 0."""

    image: Tensor
    """uint8 (3, H, W), RGB."""
    boxes: Tensor
    """float32 (n, 4): x1, y1, x2, y2 of the visible masks, the edges of their pixels."""
    labels: Tensor
    """int64 (n,): the digits, 0 to 9."""
    masks: Tensor
    """bool (n, H, W): the pixels where a digit is seen; no two overlap."""
    label_map: Tensor
    """uint8 (H, W): 0 for the background, digit + 1 where one is seen."""


def draw_scene(options: SceneOptions, split: str, index: int) -> Scene:
    """Returns the scene of an index, the same in every process.

    A digit covers those drawn before it. It stands only where at least 0.7 of each of their masks stays
    visible; where no such place is found, it is not drawn. So nothing is in the image that the truth lacks.

    Args:
        options: Size of image and digits, and the seed.
        split: `train` or `held-out`: other digits, and other parts of the photographs.
        index: Not negative.

    Raises:
        ValueError: If the split is unknown.
    """
    if split not in REGIONS:
        raise unknown("split", split, REGIONS)
    numbers = _numbers(options.seed, split, index)
    canvas = _ground(options.image_size, split, numbers)
    height, width = options.image_size
    small, labels = _small_digits(split)
    drawn: list[int] = []
    wholes: list[np.ndarray] = []  # the masks, each as if nothing covered it
    owner = np.zeros((height, width), np.uint8)  # 0, or which digit is seen, from 1
    for _ in range(_between(*options.digits, numbers)):
        row = int(next(numbers) * len(small))
        size = _between(*options.digit_size, numbers)
        ink = _enlarged(small[row], size)
        tint = [next(numbers) for _ in range(3)]
        for _ in range(TRIES):
            top = int(next(numbers) * (height - size + 1))
            left = int(next(numbers) * (width - size + 1))
            place = slice(top, top + size), slice(left, left + size)
            if _leaves_others_visible(owner, wholes, place, ink > 0.5):
                break
        else:
            continue
        part = canvas[place]
        low, high = LIGHT if part.mean() < MIDDLE else DARK
        colour = low + (high - low) * np.asarray(tint, np.float32)
        part += (colour - part) * ink[:, :, None]
        drawn.append(int(labels[row]))
        wholes.append(np.zeros((height, width), bool))
        wholes[-1][place] = ink > 0.5
        owner[place][ink > 0.5] = len(drawn)
    return _scene(canvas, drawn, owner)


def _leaves_others_visible(
    owner: np.ndarray, wholes: list[np.ndarray], place: tuple[slice, slice], mask: np.ndarray
) -> bool:
    """Returns whether enough of each earlier digit is still seen with one more mask at a place."""
    covered = np.bincount(owner[place][mask], minlength=len(wholes) + 1)
    return all(
        not covered[number] or (owner == number).sum() - covered[number] >= LEAST_VISIBLE * whole.sum()
        for number, whole in enumerate(wholes, start=1)
    )


def _scene(canvas: np.ndarray, drawn: list[int], owner: np.ndarray) -> Scene:
    """Returns the scene of its pixels (H, W, 3), its digits, and which of them is seen where."""
    labels = torch.tensor(drawn, dtype=torch.int64)
    masks = torch.from_numpy(owner)[None] == torch.arange(1, len(drawn) + 1)[:, None, None]
    values = torch.cat([torch.zeros(1, dtype=torch.uint8), (labels + 1).to(torch.uint8)])
    return Scene(
        image=torch.from_numpy((canvas + 0.5).astype(np.uint8)).permute(2, 0, 1).contiguous(),
        boxes=boxes_of(masks),
        labels=labels,
        masks=masks,
        label_map=values[torch.from_numpy(owner).long()],
    )


def boxes_of(masks: Tensor) -> Tensor:
    """Returns the boxes of masks, the edges of their pixels: (n, H, W) bool, none empty → (n, 4) float32.

    Differs from torchvision's `masks_to_boxes`, which gives the last pixel and not its far edge.
    """
    found = []
    for mask in masks:
        rows, columns = (mask.any(axis).nonzero() for axis in (1, 0))
        found.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return torch.tensor(found, dtype=torch.float32).reshape(-1, 4)


def _numbers(seed: int, split: str, index: int) -> Iterator[float]:
    """Yields numbers from 0 to 1 without end."""
    generator = generator_for(seed, f"scene {split}", index)
    while True:
        yield from torch.rand(64, generator=generator).tolist()


def _between(least: int, most: int, numbers: Iterator[float]) -> int:
    """Returns a whole number, both ends among them."""
    return least + int(next(numbers) * (most - least + 1))


def _ground(image_size: tuple[int, int], split: str, numbers: Iterator[float]) -> np.ndarray:
    """Returns a piece of a photograph, float32 (H, W, 3) from 0 to 255."""
    height, width = image_size
    whole = photograph(PHOTOGRAPHS[int(next(numbers) * len(PHOTOGRAPHS))])
    first, last = (share * whole.width for share in REGIONS[split])
    zoom = 1 + (LARGEST_ZOOM - 1) * next(numbers)
    scale = min((last - first) / width, whole.height / height) / zoom
    left = first + next(numbers) * (last - first - width * scale)
    top = next(numbers) * (whole.height - height * scale)
    box = left, top, min(left + width * scale, last), min(top + height * scale, whole.height)
    piece = whole.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.array(piece, np.float32)


@cache
def _small_digits(split: str) -> tuple[list[Image.Image], np.ndarray]:
    """Returns a split's digits as they are, 8×8 with a frame of nothing, and their labels."""
    images, labels = digits(split, DIGIT_SIDE)
    framed = np.pad(images[:, 0].numpy(), ((0, 0), (FRAME, FRAME), (FRAME, FRAME)))
    return [Image.fromarray(image) for image in framed], labels.numpy()


def _enlarged(digit: Image.Image, size: int) -> np.ndarray:
    """Returns how much of each pixel is ink, float32 (size, size) from 0 to 1; its frame is included."""
    large = digit.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(large, np.float32) / 255
